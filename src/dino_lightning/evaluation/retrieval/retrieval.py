"""`eval=retrieval`: landmark retrieval on revisited Oxford and Paris (table 3), by cosine similarity."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino_lightning.config import RetrievalEval, RevisitedData
from dino_lightning.data.benchmarks.files import list_images
from dino_lightning.data.benchmarks.revisited import Query, Revisited, open_revisited
from dino_lightning.errors import UserError
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.cache import cached_features
from dino_lightning.evaluation.features.images import ListedFiles
from dino_lightning.evaluation.registry import register_evaluation
from dino_lightning.evaluation.retrieval.descriptors import (
    CroppedFiles,
    ShrinkView,
    file_images,
    groups_of_equal_size,
    multi_scale,
    require_files,
)
from dino_lightning.evaluation.retrieval.ranking import NOT_RETRIEVABLE, Ranking, rank_database
from dino_lightning.evaluation.retrieval.sheet import RetrievedRow, retrieval_sheet
from dino_lightning.evaluation.retrieval.whitening import learn_whitening
from dino_lightning.models.frozen import rejection_as

PRECISION_AT = (1, 5, 10)
"""Numbers of images k for which mP@k is reported."""
SHEET_ROWS, SHEET_COLUMNS = 8, 8
"""Number of queries in the picture, and of retrieved images per query."""


SETUPS = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""Setup -> the lists of a query that contain its positives, and those that contain images to ignore."""


def check(config: RetrievalEval, data: RevisitedData) -> None:
    """Raise `UserError` for whitening without images to learn it from, or such images without whitening."""
    if config.whitening and data.whitening_path is None:
        raise UserError("eval.whitening=true needs data.whitening_path, a folder of images to learn it from.")
    if data.whitening_path is not None and not config.whitening:
        raise UserError(
            f"data.whitening_path={data.whitening_path} is used only with eval.whitening=true; set both or neither."
        )


@register_evaluation("retrieval", RetrievalEval, data=(RevisitedData,), check=check)
def evaluate(config: RetrievalEval, task: Task) -> Iterator[Result]:
    """mAP and mP@k of Easy, Medium and Hard: `map_medium`, `mp10_hard`, …

    Unreadable queries are left out; an unreadable database image is never retrieved.
    """
    assert isinstance(task.data, RevisitedData)
    benchmark = open_revisited(task.data)
    path, key = task.data.whitening_path, "data.whitening_path"
    whitening_images = None if path is None else list_images(path, key=key, recursive=True)
    extract = _Extraction(config, task)
    extract.check()

    database_ND, readable_N = extract(ListedFiles(benchmark.images), split="database")
    paths = [query.path for query in benchmark.queries]
    boxes = [query.box for query in benchmark.queries]
    query_files = CroppedFiles(paths, boxes=boxes) if config.query_box else ListedFiles(paths)
    queries_QD, readable_Q = extract(query_files, split="queries")
    if whitening_images is not None:
        features_MD, readable_M = extract(ListedFiles(whitening_images), split="whitening")
        whiten = learn_whitening(features_MD[readable_M], corrected=True)
        database_ND, queries_QD = whiten(database_ND), whiten(queries_QD)
    similarity_QN = _cosine(queries_QD, database_ND)
    similarity_QN[:, ~readable_N] = NOT_RETRIEVABLE

    indices = readable_Q.nonzero().flatten().tolist()
    queries = [benchmark.queries[i] for i in indices]
    unreadable = [benchmark.queries[i].name for i in (~readable_Q).nonzero().flatten().tolist()]
    if unreadable:
        task.context.say(
            f"{len(unreadable)} of {len(benchmark.queries)} queries cannot be read and are left out: "
            f"{', '.join(unreadable)}"
        )
    details = {
        "name": task.data.name,
        "unreadable_queries": unreadable,
        "unreadable_database": int((~readable_N).sum()),
    }
    for setup, lists in SETUPS.items():
        positives, junk = (
            [[i for name in names for i in getattr(query, name)] for query in queries] for names in lists
        )
        ranking = rank_database(similarity_QN[indices], positives=positives, junk=junk, at=PRECISION_AT)
        yield from _results(ranking, setup, queries, details)
        if setup == "medium" and ranking.queries and task.context.is_main:
            task.save_picture(_picture(query_files, indices, benchmark, similarity_QN[indices], ranking), "neighbors")


class _Extraction:
    """Descriptors of image files, in the order of the files."""

    def __init__(self, config: RetrievalEval, task: Task) -> None:
        self.config, self.task, self.network = config, task, task.network
        self.size = config.image_size or task.network.size
        self.view = ShrinkView(task.network, size=self.size)
        backbone = task.network.backbone
        self.forward = task.context.forward(lambda images: multi_scale(backbone, images, scales=config.scales))

    def check(self) -> None:
        """Raise `UserError` if the network does not accept images that are not squares, or a scale."""
        shape = (1, self.network.channels, max(1, self.size * 3 // 4), self.size)
        message = (
            f"eval.image_size={self.size}: {self.network.name} does not accept images of {shape[3]} x {shape[2]} "
            f"pixels at eval.scales={self.config.scales}"
        )
        with rejection_as(message):
            self.forward(torch.zeros(shape, device=self.task.context.device))

    def __call__(self, files: ListedFiles, *, split: str) -> tuple[Tensor, Tensor]:
        """Features (N, D) float32, zeros for unreadable images, and which images are readable (N,)."""
        # The boxes of queries all have different shapes.
        batch_size = 1 if isinstance(files, CroppedFiles) else self.config.batch_size_per_device
        paths = [Path(files.describe(i)) for i in range(len(files))]
        box = " query_box" if isinstance(files, CroppedFiles) else ""
        parts = []
        for size, indices in groups_of_equal_size(paths, batch_size=batch_size):
            blank: Any = tuple(self.view(Image.new("RGB", size or (self.size, self.size))).shape)
            features_MD, _, indices_M = cached_features(
                self.task,
                self.forward,
                file_images(self.task, files, self.view, blank=blank, split=split),
                label=f"{split} of {size[0]} x {size[1]}" if size else split,
                kind=f"retrieval size={self.size} scales={self.config.scales}{box}",
                batch_size=batch_size if size else 1,
                indices=indices,
            )
            parts.append((features_MD, indices_M))
        features_MD, indices_M = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        key = "data.whitening_path" if split == "whitening" else "data.path"
        require_files(indices_M, self.task, key=key, images=len(files), split=split)
        features_ND, readable_N = torch.zeros(len(files), features_MD.shape[1]), torch.zeros(len(files)).bool()
        features_ND[indices_M], readable_N[indices_M] = features_MD, True
        return features_ND, readable_N


def _cosine(queries_QD: Tensor, database_ND: Tensor) -> Tensor:
    """(Q, N) float32, rounded from float64 so that the similarities of equal database images are equal."""
    return (F.normalize(queries_QD.double(), dim=1) @ F.normalize(database_ND.double(), dim=1).T).float()


def _results(ranking: Ranking, setup: str, queries: Sequence[Query], details: dict[str, object]) -> Iterator[Result]:
    """The figures of a setup; none if no query has a positive."""
    if not ranking.queries:
        return
    details = {**details, "queries": ranking.queries}
    aps = zip(queries, ranking.ap.tolist(), strict=True)
    per_query = {query.name: 100 * ap for query, ap in aps if not math.isnan(ap)}
    yield Result(f"map_{setup}", 100 * ranking.map, main=setup != "easy", details={**details, "ap": per_query})
    for k, precision in zip(PRECISION_AT, ranking.mean_precision, strict=True):
        yield Result(f"mp{k}_{setup}", 100 * precision, details=details)


def _picture(
    query_files: ListedFiles, indices: Sequence[int], benchmark: Revisited, similarity_QN: Tensor, ranking: Ranking
) -> Image.Image:
    """Queries from the lowest to the highest average precision, and the images nearest to each."""
    order = [i for i in ranking.ap.argsort(stable=True).tolist() if ranking.ap[i].isfinite()]
    spread = torch.linspace(0, len(order) - 1, min(SHEET_ROWS, len(order))).round().long().tolist()
    rows = []
    for i in (order[position] for position in spread):
        query = benchmark.queries[indices[i]]
        by_similarity = similarity_QN[i].argsort(descending=True, stable=True).tolist()
        nearest = [n for n in by_similarity if similarity_QN[i, n] > NOT_RETRIEVABLE][:SHEET_COLUMNS]
        verdicts = [None if n in query.junk else n in query.easy or n in query.hard for n in nearest]
        rows.append(RetrievedRow(indices[i], f"AP {100 * float(ranking.ap[i]):.1f}", nearest, verdicts))
    return retrieval_sheet(rows, queries=query_files, database=ListedFiles(benchmark.images))
