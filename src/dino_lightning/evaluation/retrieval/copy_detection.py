"""`eval=copy_detection`: finds the originals of altered photographs by cosine similarity (Copydays, table 4)."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dino_lightning.config import CopydaysData, CopyDetectionEval
from dino_lightning.data.benchmarks.copydays import Copydays, open_copydays
from dino_lightning.data.benchmarks.files import list_images
from dino_lightning.errors import UserError
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.cache import cached_features
from dino_lightning.evaluation.features.images import ListedFiles
from dino_lightning.evaluation.features.knn import nearest_neighbors
from dino_lightning.evaluation.registry import register_evaluation
from dino_lightning.evaluation.retrieval.descriptors import SquareView, cls_and_gem, file_images, require_files
from dino_lightning.evaluation.retrieval.ranking import average_precision_at_top
from dino_lightning.evaluation.retrieval.sheet import RetrievedRow, retrieval_sheet
from dino_lightning.evaluation.retrieval.whitening import learn_whitening
from dino_lightning.models.frozen import check_size
from dino_lightning.models.tokens import is_vit

MAX_NAMES = 5
"""Number of queries that a message names."""
SHEET_ROWS, SHEET_COLUMNS = 4, 8
"""Number of worst and of best queries in the picture, and of retrieved images per query."""


@register_evaluation("copy_detection", CopyDetectionEval, data=(CopydaysData,))
def evaluate(config: CopyDetectionEval, task: Task) -> Iterator[Result]:
    """mAP of each block: `map_original`, `map_strong`, `map_jpegqual_3`, …

    Unreadable queries and queries whose photograph is not in the database are left out; an unreadable database image is
    never retrieved.
    """
    assert isinstance(task.data, CopydaysData)
    if not is_vit(task.network.backbone):
        raise UserError(
            "eval=copy_detection needs a ViT, whose class token and patch tokens are the descriptor; "
            f"{task.network.name} is {type(task.network.backbone).__name__}."
        )
    check_size(task.network, config.image_size or task.network.size, key="eval.image_size")
    benchmark = open_copydays(task.data)
    files = [path for paths in benchmark.blocks.values() for path in paths]
    originals = len(benchmark.blocks["original"])
    whitening, whitening_images = "none", None
    if task.data.whitening_path is not None and config.whitening != "none":
        whitening = config.whitening
        whitening_images = list_images(task.data.whitening_path, key="data.whitening_path", recursive=True)

    queries_QD, queries_Q = _extract(config, task, files, split="images")
    is_original_Q = queries_Q < originals
    if not is_original_Q.any():
        raise UserError(f"data.path: none of the {originals} images of original/ can be read.")
    database_ND, database_N = queries_QD[is_original_Q], queries_Q[is_original_Q]
    if benchmark.distractors:
        features_MD, indices_M = _extract(config, task, benchmark.distractors, split="distractors")
        database_ND, database_N = torch.cat([database_ND, features_MD]), torch.cat([database_N, indices_M + originals])
    if whitening_images is not None:
        features_MD, _ = _extract(config, task, whitening_images, split="whitening")
        whiten = learn_whitening(features_MD, corrected=whitening == "corrected")
        queries_QD, database_ND = whiten(queries_QD).float(), whiten(database_ND).float()
    device = task.context.search_device
    retrieved_QR = database_N[nearest_neighbors(database_ND, queries_QD, k=config.top, device=device)[1]]
    details = {"whitening": whitening, "distractors": len(benchmark.distractors)}
    start = 0
    for block, paths in benchmark.blocks.items():
        in_block_Q = (queries_Q >= start) & (queries_Q < start + len(paths))
        start += len(paths)
        queries = [files[i] for i in queries_Q[in_block_Q].tolist()]
        positives = [benchmark.positives(query) for query in queries]
        ap_Q = average_precision_at_top(retrieved_QR[in_block_Q], positives=positives)
        yield from _results(task, block, paths, dict(zip(queries, ap_Q.tolist(), strict=True)), details)
        if block == "strong" and task.context.is_main:
            task.save_picture(_picture(benchmark, queries, retrieved_QR[in_block_Q], ap_Q), "neighbors")


def _extract(config: CopyDetectionEval, task: Task, paths: list[Path], *, split: str) -> tuple[Tensor, Tensor]:
    """Descriptors (M, D) and indices (M,) of the readable images, by ascending index."""
    size, backbone = config.image_size or task.network.size, task.network.backbone
    blank = (task.network.channels, size, size)
    features_MD, _, indices_M = cached_features(
        task,
        task.context.forward(lambda images_BCHW: cls_and_gem(backbone, images_BCHW, power=config.gem_power)),
        file_images(task, ListedFiles(paths), SquareView(task.network, size=size), blank=blank, split=split),
        label=split,
        kind=f"copy_detection size={size} gem_power={config.gem_power}",
        batch_size=config.batch_size_per_device,
    )
    key = "data.path" if split == "images" else f"data.{split}_path"
    require_files(indices_M, task, key=key, images=len(paths), split=split)
    return features_MD, indices_M


def _results(
    task: Task, block: str, paths: list[Path], aps: dict[Path, float], details: dict[str, object]
) -> Iterator[Result]:
    """The mAP of a block over the valid queries; no result without one."""
    valid = {path.name: 100 * ap for path, ap in aps.items() if not math.isnan(ap)}
    unreadable = [path.name for path in paths if path not in aps]
    without_original = [path.name for path, ap in aps.items() if math.isnan(ap)]
    for names, reason in ((unreadable, "cannot be read"), (without_original, "show none of the originals")):
        if names:
            text = ", ".join(names[:MAX_NAMES]) + (", …" if len(names) > MAX_NAMES else "")
            task.context.say(f"{len(names)} of {len(paths)} queries of {block}/ {reason} and are left out: {text}")
    if valid:
        counts = {"queries": len(valid), "unreadable": unreadable, "without_original": without_original, "ap": valid}
        value = sum(valid.values()) / len(valid)
        yield Result(f"map_{block.replace('/', '_')}", value, main=block == "strong", details={**details, **counts})


def _picture(benchmark: Copydays, queries: list[Path], retrieved_QR: Tensor, ap_Q: Tensor) -> Image.Image:
    """The queries with the lowest and the highest average precision, and the images retrieved for each."""
    order = [i for i in ap_Q.argsort(stable=True).tolist() if not ap_Q[i].isnan()]
    selected = order if len(order) <= 2 * SHEET_ROWS else order[:SHEET_ROWS] + order[-SHEET_ROWS:]
    rows = []
    for i in selected:
        positives, retrieved = benchmark.positives(queries[i]), retrieved_QR[i, :SHEET_COLUMNS].tolist()
        verdicts: list[bool | None] = [index in positives for index in retrieved]
        rows.append(RetrievedRow(i, f"AP {100 * float(ap_Q[i]):.1f}", retrieved, verdicts))
    return retrieval_sheet(rows, queries=ListedFiles(queries), database=ListedFiles(benchmark.database))
