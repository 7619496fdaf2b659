"""`eval=neighbors`: a picture of the nearest neighbors of some images, a quick check of features on your own data."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from dino_lightning.config import CropsConfig, NeighborsEval
from dino_lightning.data.crops import denormalize
from dino_lightning.data.sources import ImageSource
from dino_lightning.errors import UserError
from dino_lightning.evaluation.classification.splits import LABELS, split_images
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.cache import cached_features, require_readable
from dino_lightning.evaluation.features.extract import spread_over_classes
from dino_lightning.evaluation.features.images import ViewedImages, class_names
from dino_lightning.evaluation.features.knn import nearest_neighbors
from dino_lightning.evaluation.features.spec import NETWORK_OUTPUT
from dino_lightning.evaluation.registry import register_evaluation
from dino_lightning.report.pictures.sheets import neighbor_sheet, to_picture


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
    queries, neighbors, similarities = queries_M.tolist(), [], []
    for query, positions_K, similarity_K in zip(queries, positions_MK, similarity_MK, strict=True):
        others_K = bank_N[positions_K] != query if val is None else slice(None)  # a query is its own nearest neighbor
        neighbors.append(bank_N[positions_K][others_K][: config.neighbors].tolist())
        similarities += similarity_K[others_K][: config.neighbors].tolist()
    task.save_picture(_sheet(task, query_images, bank_images, queries, neighbors), "neighbors")
    details = {"queries": queries, "neighbors": neighbors}
    same = _same_class(source, train, queries, neighbors)
    if same:
        yield Result("same_class_share", 100 * float(np.mean(same)), main=True, details=details)
    yield Result("mean_similarity", float(np.mean(similarities)), unit="", main=not same, details=details)


def query_indices(config: NeighborsEval, source: ImageSource, *, seed: int) -> list[int]:
    """The configured indices, or some drawn by seed: of labeled images one per class before a second of any class."""
    if config.queries is not None:
        if not config.queries or not all(0 <= index < len(source) for index in config.queries):
            raise UserError(f"eval.queries={config.queries}: expected positions from 0 to {len(source) - 1}.")
        return sorted(set(config.queries))
    return sorted(spread_over_classes(source.labels, len(source), seed=seed)[: config.random_queries].tolist())


def _same_class(source: ImageSource, train: ImageSource, queries: list[int], neighbors: list[list[int]]) -> list[bool]:
    """For each pair with known classes, whether they are equal."""
    return [
        name == neighbor_name
        for name, found in zip(class_names(source, queries), neighbors, strict=True)
        for neighbor_name in class_names(train, found)
        if name is not None and neighbor_name is not None
    ]


def _sheet(
    task: Task, query_images: ViewedImages, bank_images: ViewedImages, queries: list[int], neighbors: list[list[int]]
) -> Image.Image:
    config = CropsConfig(mean=task.network.mean, std=task.network.std)

    def picture(images: ViewedImages, index: int) -> Image.Image:
        return to_picture(denormalize(images[index][0], config=config))

    query_labels = class_names(query_images.source, queries)
    neighbor_labels = [class_names(bank_images.source, found) for found in neighbors]
    return neighbor_sheet(
        [picture(query_images, query) for query in queries],
        [[picture(bank_images, index) for index in found] for found in neighbors],
        query_labels=query_labels if any(query_labels) else None,
        neighbor_labels=neighbor_labels if any(map(any, neighbor_labels)) else None,
    )
