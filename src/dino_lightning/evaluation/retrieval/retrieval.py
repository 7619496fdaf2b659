"""Landmark retrieval on revisited Oxford and Paris (table 3): the database ranked by cosine similarity to a query."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino_lightning.config import DataConfig, RetrievalEval, RevisitedData
from dino_lightning.data.benchmarks.files import images_in
from dino_lightning.data.benchmarks.revisited import Query, Revisited, open_revisited
from dino_lightning.errors import UserError
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.cache import cached_features
from dino_lightning.evaluation.features.images import ImageFiles, ViewedImages
from dino_lightning.evaluation.retrieval.descriptors import BoxedFiles, Shrunk, groups_of_equal_size, multi_scale
from dino_lightning.evaluation.retrieval.ranking import NEVER, Ranking, rank_database
from dino_lightning.evaluation.retrieval.sheet import Row, found_sheet
from dino_lightning.evaluation.retrieval.whitening import learn_whitening

AT = (1, 5, 10)
"""Numbers of images whose precision is reported."""
ROWS, SHOWN = 8, 8
"""Queries in the picture, and what was found for each."""


def evaluate(config: RetrievalEval, task: Task) -> Iterator[Result]:
    """mAP and mP@k of Easy, Medium and Hard: `map_medium`, `mp10_hard`, …

    A query that cannot be read is left out; a database image that cannot be read is never found.
    """
    assert isinstance(task.data, RevisitedData)
    benchmark = open_revisited(task.data)
    learnt_on = _whitening_images(config, task.data)
    extract = _Extraction(config, task)
    extract.check()

    database_ND, in_database_N = extract(ImageFiles(benchmark.images), split="database")
    paths = [query.path for query in benchmark.queries]
    boxes = [query.box for query in benchmark.queries]
    queries = BoxedFiles(paths, boxes=boxes) if config.query_box else ImageFiles(paths)
    queries_QD, readable_Q = extract(queries, split="queries")
    if learnt_on is not None:
        features_MD, found_M = extract(ImageFiles(learnt_on), split="whitening")
        whiten = learn_whitening(features_MD[found_M], corrected=True)
        database_ND, queries_QD = whiten(database_ND), whiten(queries_QD)
    similarity_QN = _cosine(queries_QD, database_ND)
    similarity_QN[:, ~in_database_N] = NEVER

    kept = readable_Q.nonzero().flatten().tolist()
    asked = [benchmark.queries[i] for i in kept]
    lost = [query.name for i, query in enumerate(benchmark.queries) if i not in set(kept)]
    if lost:
        task.runtime.say(
            f"{len(lost)} of {len(benchmark.queries)} queries cannot be read and are left out: {', '.join(lost)}"
        )
    facts = {"name": task.data.name, "unreadable_queries": lost, "unreadable_database": int((~in_database_N).sum())}
    for setup in ("easy", "medium", "hard"):
        ranking = rank_database(similarity_QN[kept], at=AT, **relevance(asked, setup))
        yield from _results(ranking, setup, asked, facts)
        if setup == "medium" and ranking.queries and task.runtime.is_main:
            picture = _picture(queries, kept, benchmark, similarity_QN[kept], ranking)
            task.picture(picture, "neighbors")


def relevance(queries: Sequence[Query], setup: str) -> dict[str, list[list[int]]]:
    """`positives` and `junk` of each query in the setup `easy`, `medium` or `hard`."""
    match setup:
        case "easy":
            chosen = [(query.easy, query.junk + query.hard) for query in queries]
        case "medium":
            chosen = [(query.easy + query.hard, query.junk) for query in queries]
        case "hard":
            chosen = [(query.hard, query.junk + query.easy) for query in queries]
        case _:
            raise ValueError(setup)
    return {"positives": [positives for positives, _ in chosen], "junk": [junk for _, junk in chosen]}


class _Extraction:
    """Descriptors of image files, in the order of the files."""

    def __init__(self, config: RetrievalEval, task: Task) -> None:
        self.config, self.task, self.network = config, task, task.network
        self.size = config.image_size or task.network.size
        self.view = Shrunk(task.network, size=self.size)
        self.forward = task.runtime.forward(self._descriptors)

    def check(self) -> None:
        """Raises `UserError` where the network does not take images that are no squares, or of a scale."""
        shape = (1, self.network.channels, max(1, self.size * 3 // 4), self.size)
        try:
            self.forward(torch.zeros(shape, device=self.task.runtime.device))
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"eval.image_size={self.size}: {self.network.name} does not take images of {shape[3]} x {shape[2]} "
                f"pixels at eval.scales={self.config.scales} ({reason})."
            ) from error

    def __call__(self, files: ImageFiles, *, split: str) -> tuple[Tensor, Tensor]:
        """Features (N, D) float32 and which images could be read (N,); zeros for the others."""
        # A query's box has a shape of its own.
        batch_size = 1 if isinstance(files, BoxedFiles) else self.config.batch_size_per_device
        paths = [Path(str(path)) for path in files.paths]
        parts = [
            self._extract(files, split, size, positions, batch_size if size else 1)
            for size, positions in groups_of_equal_size(paths, batch_size=batch_size)
        ]
        indices_M = torch.cat([indices for _, _, indices in parts])
        if not len(indices_M):
            key = "data.whitening_path" if split == "whitening" else "data.path"
            raise UserError(
                f"{key}: none of the {len(files)} images for {split} can be read; see "
                f"bad_images_{split}.txt in {self.task.output}."
            )
        features_MD = torch.cat([features for features, _, _ in parts])
        features_ND, found_N = torch.zeros(len(files), features_MD.shape[1]), torch.zeros(len(files), dtype=torch.bool)
        features_ND[indices_M], found_N[indices_M] = features_MD, True
        return features_ND, found_N

    def _extract(
        self, files: ImageFiles, split: str, size: tuple[int, int] | None, positions: list[int], batch_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        like = Image.new("RGB", size or (self.size, self.size))
        images = ViewedImages(
            files,
            self.view,
            blank=tuple(self.view(like).shape),  # pyright: ignore[reportArgumentType]
            config=DataConfig(max_bad_share=1),
            bad_images=self.task.output / f"bad_images_{split}.txt",
        )
        box = " query_box" if isinstance(files, BoxedFiles) else ""
        return cached_features(
            self.task,
            self.forward,
            images,
            what=f"{split} of {size[0]} x {size[1]}" if size else split,
            kind=f"retrieval size={self.size} scales={self.config.scales}{box}",
            batch_size=batch_size,
            indices=positions,
        )

    def _descriptors(self, images_BCHW: Tensor) -> Tensor:
        return multi_scale(self.network.backbone, images_BCHW, scales=self.config.scales)


def _whitening_images(config: RetrievalEval, data: RevisitedData) -> list[Path] | None:
    if config.whitening and data.whitening_path is None:
        raise UserError("eval.whitening=true needs data.whitening_path, a folder of images to learn it on.")
    if data.whitening_path is None:
        return None
    if not config.whitening:
        raise UserError(
            f"data.whitening_path={data.whitening_path} is used with eval.whitening=true only; set it, or "
            "leave the path out."
        )
    return images_in(data.whitening_path, key="data.whitening_path", below=True)


def _cosine(queries_QD: Tensor, database_ND: Tensor) -> Tensor:
    """(Q, N) float32. Rounded from float64, so that equal database images come out equal, and tie."""
    return (F.normalize(queries_QD.double(), dim=1) @ F.normalize(database_ND.double(), dim=1).T).float()


def _results(ranking: Ranking, setup: str, queries: Sequence[Query], facts: dict[str, object]) -> Iterator[Result]:
    """None where no query has an image to find."""
    if not ranking.queries:
        return
    aps = zip(queries, ranking.ap.tolist(), strict=True)
    per_query = {query.name: 100 * ap for query, ap in aps if not math.isnan(ap)}
    details = {**facts, "queries": ranking.queries, "ap": per_query}
    yield Result(f"map_{setup}", 100 * ranking.map, main=setup != "easy", details=details)
    for k, precision in zip(AT, ranking.mean_precision, strict=True):
        yield Result(f"mp{k}_{setup}", 100 * precision, details={**facts, "queries": ranking.queries})


def _picture(
    queries: ImageFiles, kept: Sequence[int], benchmark: Revisited, similarity_QN: Tensor, ranking: Ranking
) -> Image.Image:
    """Queries from the worst to the best average precision, and the images nearest to each."""
    counted = [i for i in ranking.ap.argsort(stable=True).tolist() if ranking.ap[i].isfinite()]
    spread = torch.linspace(0, len(counted) - 1, min(ROWS, len(counted))).round().long().tolist()
    database = ImageFiles(benchmark.images)
    rows = []
    for i in (counted[place] for place in spread):
        own = benchmark.queries[kept[i]]
        order = similarity_QN[i].argsort(descending=True, stable=True).tolist()
        nearest = [n for n in order if similarity_QN[i, n] > NEVER][:SHOWN]
        verdicts = [None if n in own.junk else n in own.easy or n in own.hard for n in nearest]
        rows.append(Row(kept[i], f"AP {100 * float(ranking.ap[i]):.1f}", nearest, verdicts))
    return found_sheet(rows, queries=queries, database=database)
