"""The nearest neighbors of some images as a picture: the first thing people check on their own data."""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from dino_lightning.config import CropsConfig, NeighborsEval
from dino_lightning.data.crops import denormalize
from dino_lightning.data.sources import ImageSource
from dino_lightning.errors import UserError
from dino_lightning.evaluation.classification.splits import viewed
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.cache import cached_features
from dino_lightning.evaluation.features.images import BROKEN, ViewedImages
from dino_lightning.evaluation.features.knn import nearest_neighbors
from dino_lightning.report.pictures.sheets import neighbor_sheet, to_picture

Neighbors = Sequence[Sequence[tuple[int, float]]]
"""Of each query, position and similarity of the images found, nearest first."""


def evaluate(config: NeighborsEval, task: Task) -> Iterator[Result]:
    """`same_class_share` of the neighbors in percent where there are labels, `mean_similarity` in any case.

    Queries are validation images, looked for among the training images; without validation images they are training
    images, each looked for among the others.
    """
    train = task.sources.train
    if not isinstance(train, ImageSource):
        raise UserError("data: neighbors are looked up by index, which a stream cannot; download the data.")
    val = task.sources.val
    source = train if val is None else val
    queries = query_positions(config, source, seed=task.seed)
    enough = len(train) - (val is None)
    if config.neighbors > enough:
        raise UserError(
            f"eval.neighbors={config.neighbors}: there are {enough} images to choose from; set it to at most {enough}."
        )

    forward, batch_size = task.runtime.forward(task.network.backbone), config.batch_size_per_device
    split = "train" if val is None else "val"
    bank_images, query_images = viewed(task, train, config, split="train"), viewed(task, source, config, split=split)
    bank_ND, _, positions_N = cached_features(
        task, forward, bank_images, what="training images", kind="backbone", batch_size=batch_size
    )
    queries_MD, _, found_M = cached_features(
        task, forward, query_images, what="queries", kind="backbone", batch_size=batch_size, indices=queries
    )
    if not len(found_M):
        raise UserError(f"data: none of the query images can be read, see {task.output / f'bad_images_{split}.txt'}.")
    if len(positions_N) <= (val is None):
        raise UserError(f"data: no image to choose from can be read, see {task.output / 'bad_images_train.txt'}.")
    similarity_MK, rows_MK = nearest_neighbors(
        bank_ND, queries_MD, k=config.neighbors + (val is None), device=task.runtime.search_device
    )
    neighbors = [
        [(int(positions_N[row]), float(value)) for row, value in zip(rows, values, strict=True)]
        for rows, values in zip(rows_MK, similarity_MK, strict=True)
    ]
    if val is None:
        neighbors = [
            [pair for pair in row if pair[0] != int(query)][: config.neighbors]
            for query, row in zip(found_M, neighbors, strict=True)
        ]
    task.picture(_sheet(task, query_images, bank_images, found_M.tolist(), neighbors), "neighbors")
    details = {"queries": found_M.tolist(), "neighbors": [[position for position, _ in row] for row in neighbors]}
    same = _same_class(source, train, found_M.tolist(), neighbors)
    if same:
        yield Result("same_class_share", 100 * float(np.mean(same)), main=True, details=details)
    mean = float(np.mean([value for row in neighbors for _, value in row]))
    yield Result("mean_similarity", mean, unit="", main=not same, details=details)


def query_positions(config: NeighborsEval, source: ImageSource, *, seed: int) -> list[int]:
    """The chosen positions, or some drawn by seed: of labeled images one of each class before a second of any."""
    if config.queries is not None:
        wrong = [position for position in config.queries if not 0 <= position < len(source)]
        if wrong or not config.queries:
            raise UserError(f"eval.queries={config.queries}: expected positions from 0 to {len(source) - 1}.")
        return sorted(set(config.queries))
    order = np.random.default_rng(seed).permutation(len(source))
    if source.labels is not None:
        seen: dict[int, int] = {}
        turn = []
        for position in order:
            label = int(source.labels[position])
            turn.append(seen.get(label, 0))
            seen[label] = turn[-1] + 1
        order = order[np.argsort(turn, kind="stable")]
    return sorted(order[: config.random_queries].tolist())


def _same_class(source: ImageSource, train: ImageSource, queries: list[int], neighbors: Neighbors) -> list[bool]:
    """For each pair whose classes are known whether they are the same."""
    pairs = [
        (_class_name(source, query), _class_name(train, position))
        for query, row in zip(queries, neighbors, strict=True)
        for position, _ in row
    ]
    return [own == other for own, other in pairs if own is not None and other is not None]


def _class_name(source: ImageSource, position: int) -> str | None:
    label = -1 if source.labels is None else int(source.labels[position])
    return source.classes[label] if source.classes and label >= 0 else None


def _sheet(
    task: Task,
    queries: ViewedImages,
    bank: ViewedImages,
    positions: list[int],
    neighbors: Neighbors,
) -> Image.Image:
    config = CropsConfig(mean=task.network.mean, std=task.network.std)

    def shown(images: ViewedImages, position: int) -> Image.Image:
        image, label = images[position]
        assert label != BROKEN, "features of a broken image"
        return to_picture(denormalize(image, config=config))

    own = [_class_name(queries.source, position) for position in positions]
    others = [[_class_name(bank.source, position) for position, _ in row] for row in neighbors]
    return neighbor_sheet(
        [shown(queries, position) for position in positions],
        [[shown(bank, position) for position, _ in row] for row in neighbors],
        query_labels=own if any(own) else None,
        neighbor_labels=others if any(map(any, others)) else None,
    )
