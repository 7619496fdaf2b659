"""Weighted k-NN classification of the validation images by the training images (section 4.1, table 2).

The figure of the callback that runs while training, for whole data sets, a few labels, several k and temperatures.
"""

from collections.abc import Iterator

import numpy as np

from dino_lightning.config import KNNEval
from dino_lightning.errors import UserError
from dino_lightning.evaluation.classification.splits import Labeled, class_features, labeled_sources
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.extract import subset_indices
from dino_lightning.evaluation.features.knn import nearest_neighbors, vote_accuracy
from dino_lightning.runtime.collectives import rank, world_size

HEADLINE_K = 20
"""The paper's k; the first of `k` where it is not among them."""


def evaluate(config: KNNEval, task: Task) -> Iterator[Result]:
    """`top1_k20`, `top5_k20`, …, and with several temperatures `top1_k20_t0.07`, …, in percent.

    Every rank holds the whole bank, 4 N D bytes, and looks for the neighbors of its share of the queries.
    """
    images = labeled_sources(task)
    bank = bank_indices(config, images, seed=task.seed)
    known = images.known("val")
    queries = [known[i] for i in subset_indices(len(known), limit=config.queries, seed=task.seed)]
    _check_k(config, bank=len(bank))
    found = class_features(task, config, images, chosen={"train": bank, "val": queries})
    (bank_ND, bank_labels_N), (queries_MD, query_labels_M) = found["train"], found["val"]
    _check_k(config, bank=len(bank_ND))  # again, without the broken images
    own = slice(rank(), None, world_size())
    similarity_MK, neighbors_MK = nearest_neighbors(
        bank_ND, queries_MD[own], k=max(config.k), device=task.runtime.search_device
    )
    headline = HEADLINE_K if HEADLINE_K in config.k else config.k[0]
    for temperature in config.temperatures:
        accuracy = vote_accuracy(
            similarity_MK,
            neighbors_MK,
            bank_labels_N,
            query_labels_M[own],
            k=config.k,
            temperature=temperature,
            num_classes=len(images.classes),
        )
        suffix = f"_t{temperature:g}" if len(config.temperatures) > 1 else ""
        details = {"bank": len(bank_ND), "queries": len(queries_MD), "classes": len(images.classes)}
        for k, both in accuracy.items():
            for name, value in both.items():
                yield Result(f"{name}_k{k}{suffix}", value, main=k == headline, details=details)


def _check_k(config: KNNEval, *, bank: int) -> None:
    if max(config.k) > bank:
        raise UserError(
            f"eval.k={max(config.k)}: there are {bank} training images to choose neighbors from; "
            f"set eval.k to at most {bank}."
        )


def bank_indices(config: KNNEval, images: Labeled, *, seed: int) -> list[int]:
    """Positions of the training images in the bank, rising; the same on every rank."""
    known = np.array(images.known("train"))
    if config.n_per_class is not None:
        known = few_of_each(known, images, n=config.n_per_class, seed=seed)
    return [int(known[i]) for i in subset_indices(len(known), limit=config.bank, seed=seed)]


def few_of_each(known: np.ndarray, images: Labeled, *, n: int, seed: int) -> np.ndarray:
    """`n` positions out of `known` (m,) for each class, drawn by seed, rising."""
    assert images.train.labels is not None
    sizes = np.bincount(images.train.labels[known], minlength=len(images.classes))
    fewest = int(sizes.min())
    if fewest < n:
        choice = f"at most {fewest}, or to null for all" if fewest else "null for all"
        raise UserError(
            f"eval.n_per_class={n}: the class '{images.classes[sizes.argmin()]}' has {fewest} training "
            f"images; set it to {choice}."
        )
    order = np.random.default_rng(seed).permutation(known)
    labels = images.train.labels[order]
    return np.sort(np.concatenate([order[labels == label][:n] for label in range(len(images.classes))]))
