"""Copy detection on Copydays (table 4): the photographs that an altered copy may come from, by cosine similarity."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dino_lightning.config import CopydaysData, CopyDetectionEval, DataConfig
from dino_lightning.data.benchmarks.copydays import Copydays, open_copydays
from dino_lightning.data.benchmarks.files import images_in
from dino_lightning.errors import UserError
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.cache import cached_features
from dino_lightning.evaluation.features.images import ImageFiles, ViewedImages
from dino_lightning.evaluation.features.knn import nearest_neighbors
from dino_lightning.evaluation.retrieval.descriptors import Squared, cls_and_gem
from dino_lightning.evaluation.retrieval.ranking import average_precision_at_top
from dino_lightning.evaluation.retrieval.sheet import Row, found_sheet
from dino_lightning.evaluation.retrieval.whitening import learn_whitening
from dino_lightning.models.tokens import is_vit

MOST_NAMED = 5
"""Queries that a message names."""
ROWS, SHOWN = 4, 8
"""Worst and best queries in the picture, and what was retrieved for each."""


def evaluate(config: CopyDetectionEval, task: Task) -> Iterator[Result]:
    """mAP of each block: `map_original`, `map_strong`, `map_jpegqual_3`, …

    A query that cannot be read, or whose photograph is not in the database, is left out; a database image that cannot
    be read is never retrieved.
    """
    assert isinstance(task.data, CopydaysData)
    if not is_vit(task.network.backbone):
        raise UserError(
            f"eval=copy_detection needs a ViT, whose class token and patch tokens are the descriptor; "
            f"{task.network.name} is {type(task.network.backbone).__name__}."
        )
    benchmark = open_copydays(task.data)
    learnt_on = _whitening_images(config, task.data)

    files = [path for paths in benchmark.blocks.values() for path in paths]
    images = _extract(config, task, files, split="images")
    database = _first(images, len(benchmark.blocks["original"]))
    if benchmark.distractors:
        distractors = _extract(config, task, benchmark.distractors, split="distractors")
        database = _joined(database, distractors, after=len(benchmark.blocks["original"]))
    kind = "none"
    if learnt_on is not None:
        kind = config.whitening
        features_MD = _extract(config, task, learnt_on, split="whitening").features
        whiten = learn_whitening(features_MD, corrected=kind == "corrected")
        images, database = (replace(own, features=whiten(own.features).float()) for own in (images, database))
    device = task.runtime.search_device
    places_QR = nearest_neighbors(database.features, images.features, k=config.top, device=device)[1]
    found_QR = database.positions[places_QR]
    facts = {"whitening": kind, "distractors": len(benchmark.distractors)}
    for block, (start, paths) in _with_starts(benchmark).items():
        rows = ((images.positions >= start) & (images.positions < start + len(paths))).nonzero().flatten()
        queries = [files[int(i)] for i in images.positions[rows]]
        ap_Q = average_precision_at_top(found_QR[rows], positives=[benchmark.positives(query) for query in queries])
        yield from _results(task, block, paths, dict(zip(queries, ap_Q.tolist(), strict=True)), facts)
        if block == "strong" and task.runtime.is_main:
            task.picture(_picture(benchmark, queries, found_QR[rows], ap_Q), "neighbors")


@dataclass(frozen=True)
class _Descriptors:
    """Of the M images that could be read."""

    features: Tensor
    """(M, D)."""
    positions: Tensor
    """Among all images, rising (M,)."""


def _extract(config: CopyDetectionEval, task: Task, paths: list[Path], *, split: str) -> _Descriptors:
    size = config.image_size or task.network.size
    backbone = task.network.backbone
    images = ViewedImages(
        ImageFiles(paths),
        Squared(task.network, size=size),
        blank=(task.network.channels, size, size),
        config=DataConfig(max_bad_share=1),
        bad_images=task.output / f"bad_images_{split}.txt",
    )
    features_MD, _, positions_M = cached_features(
        task,
        task.runtime.forward(lambda images_BCHW: cls_and_gem(backbone, images_BCHW, power=config.gem_power)),
        images,
        what=split,
        kind=f"copy_detection size={size} gem_power={config.gem_power}",
        batch_size=config.batch_size_per_device,
    )
    if not len(positions_M):
        key = "data.path" if split == "images" else f"data.{split}_path"
        raise UserError(
            f"{key}: none of the {len(paths)} images can be read; see bad_images_{split}.txt in {task.output}."
        )
    return _Descriptors(features_MD, positions_M)


def _first(images: _Descriptors, count: int) -> _Descriptors:
    """Those of the first `count` images that could be read."""
    own_M = images.positions < count
    if not own_M.any():
        raise UserError(f"data.path: none of the {count} images of original/ can be read.")
    return _Descriptors(images.features[own_M], images.positions[own_M])


def _joined(originals: _Descriptors, distractors: _Descriptors, *, after: int) -> _Descriptors:
    return _Descriptors(
        torch.cat([originals.features, distractors.features]),
        torch.cat([originals.positions, distractors.positions + after]),
    )


def _whitening_images(config: CopyDetectionEval, data: CopydaysData) -> list[Path] | None:
    if data.whitening_path is None or config.whitening == "none":
        return None
    return images_in(data.whitening_path, key="data.whitening_path", below=True)


def _with_starts(benchmark: Copydays) -> dict[str, tuple[int, list[Path]]]:
    """Each block's first position among all images, and its images."""
    starts = accumulate((len(paths) for paths in benchmark.blocks.values()), initial=0)
    return {block: (start, paths) for start, (block, paths) in zip(starts, benchmark.blocks.items(), strict=False)}


def _results(
    task: Task, block: str, paths: list[Path], aps: dict[Path, float], facts: dict[str, object]
) -> Iterator[Result]:
    """The mAP of a block over the queries that count; none where there are none."""
    counted = {path.name: 100 * ap for path, ap in aps.items() if not math.isnan(ap)}
    unreadable = [path.name for path in paths if path not in aps]
    alone = [path.name for path, ap in aps.items() if math.isnan(ap)]
    for names, why in ((unreadable, "cannot be read"), (alone, "show none of the originals")):
        if names:
            shown = ", ".join(names[:MOST_NAMED]) + (", …" if len(names) > MOST_NAMED else "")
            task.runtime.say(f"{len(names)} of {len(paths)} queries of {block}/ {why} and are left out: {shown}")
    if counted:
        details = {**facts, "queries": len(counted), "unreadable": unreadable, "without_original": alone, "ap": counted}
        value = sum(counted.values()) / len(counted)
        yield Result(f"map_{block.replace('/', '_')}", value, main=block == "strong", details=details)


def _picture(benchmark: Copydays, queries: list[Path], found_QR: Tensor, ap_Q: Tensor) -> Image.Image:
    """The queries with the lowest and with the highest average precision, and what was retrieved for each."""
    order = [i for i in ap_Q.argsort(stable=True).tolist() if not ap_Q[i].isnan()]
    chosen = order if len(order) <= 2 * ROWS else order[:ROWS] + order[-ROWS:]
    rows = []
    for i in chosen:
        positives, found = benchmark.positives(queries[i]), found_QR[i, :SHOWN].tolist()
        rows.append(Row(i, f"AP {100 * float(ap_Q[i]):.1f}", found, [place in positives for place in found]))
    return found_sheet(rows, queries=ImageFiles(queries), database=ImageFiles(benchmark.database))
