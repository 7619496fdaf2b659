"""`eval=neighbors`: a picture of the nearest neighbors of some images, a quick check of features on your own data."""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from dino_lightning.config import CropsConfig, NeighborsEval
from dino_lightning.data.crops import denormalize
from dino_lightning.data.sources import ImageSource
from dino_lightning.errors import UserError
from dino_lightning.evaluation.classification.splits import LABELS, split_images
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.cache import cached_features, require_readable
from dino_lightning.evaluation.features.images import ViewedImages, class_names
from dino_lightning.evaluation.features.knn import nearest_neighbors
from dino_lightning.evaluation.features.spec import NETWORK_OUTPUT
from dino_lightning.evaluation.registry import register_evaluation
from dino_lightning.report.pictures.sheets import neighbor_sheet, to_picture

Neighbors = Sequence[Sequence[tuple[int, float]]]
"""Index and similarity of the neighbors of each query, nearest first."""


@register_evaluation("neighbors", NeighborsEval)
def evaluate(config: NeighborsEval, task: Task) -> Iterator[Result]:
    """`mean_similarity`, and for labeled images `same_class_share`, the percentage of neighbors of the query's class.

    Queries are validation images and neighbors are training images. Without validation images, queries are training
    images, and their neighbors are other training images.
    """
    train, val = task.splits.train, task.splits.val
    if not isinstance(train, ImageSource):
        raise UserError("data: neighbors are read by index, which streams do not support; download the data.")
    source, split = (train, "train") if val is None else (val, "val")
    queries = query_indices(config, source, seed=task.seed)
    candidates = len(train) - (val is None)
    if config.neighbors > candidates:
        raise UserError(
            f"eval.neighbors={config.neighbors}: there are {candidates} images to choose from; set it to at most "
            f"{candidates}."
        )
    bank_images = split_images(task, train, config, split="train")
    query_images = split_images(task, source, config, split=split)
    options = {
        "forward": task.context.forward(task.network.backbone),
        "kind": NETWORK_OUTPUT.cache_key,
        "batch_size": config.batch_size_per_device,
    }
    bank_ND, _, bank_N = cached_features(task, images=bank_images, label=LABELS["train"], **options)
    queries_MD, _, queries_M = cached_features(task, images=query_images, label="queries", indices=queries, **options)
    require_readable(queries_M, task, label="query images", split=split)
    require_readable(bank_N[int(val is None) :], task, label="images to choose from", split="train")
    similarity_MK, positions_MK = nearest_neighbors(
        bank_ND, queries_MD, k=config.neighbors + (val is None), device=task.context.search_device
    )
    neighbors: Neighbors = [
        [
            (index, similarity)
            for index, similarity in zip(bank_N[positions_K].tolist(), similarity_K.tolist(), strict=True)
            if val is not None or index != query  # a query is its own nearest neighbor
        ][: config.neighbors]
        for query, positions_K, similarity_K in zip(queries_M.tolist(), positions_MK, similarity_MK, strict=True)
    ]
    queries = queries_M.tolist()
    task.save_picture(_sheet(task, query_images, bank_images, queries, neighbors), "neighbors")
    details = {"queries": queries, "neighbors": [[index for index, _ in pairs] for pairs in neighbors]}
    same = _same_class(source, train, queries, neighbors)
    if same:
        yield Result("same_class_share", 100 * float(np.mean(same)), main=True, details=details)
    mean = float(np.mean([similarity for pairs in neighbors for _, similarity in pairs]))
    yield Result("mean_similarity", mean, unit="", main=not same, details=details)


def query_indices(config: NeighborsEval, source: ImageSource, *, seed: int) -> list[int]:
    """The configured indices, or some drawn by seed: of labeled images one per class before a second of any class."""
    if config.queries is not None:
        if not config.queries or not all(0 <= index < len(source) for index in config.queries):
            raise UserError(f"eval.queries={config.queries}: expected positions from 0 to {len(source) - 1}.")
        return sorted(set(config.queries))
    order = np.random.default_rng(seed).permutation(len(source))
    if source.labels is not None:
        counts: dict[int, int] = {}
        rounds = []
        for label in source.labels[order].tolist():
            rounds.append(counts.get(label, 0))
            counts[label] = rounds[-1] + 1
        order = order[np.argsort(rounds, kind="stable")]
    return sorted(order[: config.random_queries].tolist())


def _same_class(source: ImageSource, train: ImageSource, queries: list[int], neighbors: Neighbors) -> list[bool]:
    """For each pair with known classes, whether they are equal."""
    return [
        name == neighbor_name
        for name, pairs in zip(class_names(source, queries), neighbors, strict=True)
        for neighbor_name in class_names(train, [index for index, _ in pairs])
        if name is not None and neighbor_name is not None
    ]


def _sheet(
    task: Task, query_images: ViewedImages, bank_images: ViewedImages, queries: list[int], neighbors: Neighbors
) -> Image.Image:
    config = CropsConfig(mean=task.network.mean, std=task.network.std)

    def picture(images: ViewedImages, index: int) -> Image.Image:
        return to_picture(denormalize(images[index][0], config=config))

    query_labels = class_names(query_images.source, queries)
    neighbor_labels = [class_names(bank_images.source, [index for index, _ in pairs]) for pairs in neighbors]
    return neighbor_sheet(
        [picture(query_images, query) for query in queries],
        [[picture(bank_images, index) for index, _ in pairs] for pairs in neighbors],
        query_labels=query_labels if any(query_labels) else None,
        neighbor_labels=neighbor_labels if any(map(any, neighbor_labels)) else None,
    )
