"""`eval=knn`: weighted k-NN classification of the validation images by the training images (section 4.1, table 2).

It computes the same figure as the k-NN callback of training, but for whole datasets, few labels, several k and
temperatures.
"""

from collections.abc import Iterator

import numpy as np

from dino_lightning.config import KNNEval
from dino_lightning.errors import UserError
from dino_lightning.evaluation.classification.splits import LabeledSplits, open_labeled, split_features
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.extract import labeled_subset, subset_indices
from dino_lightning.evaluation.features.knn import nearest_neighbors, vote_accuracy
from dino_lightning.evaluation.registry import register_evaluation
from dino_lightning.runtime.collectives import rank, world_size

HEADLINE_K = 20
"""The paper's k, whose result is the main one; if `k` does not contain it, the first of `k`."""


@register_evaluation("knn", KNNEval)
def evaluate(config: KNNEval, task: Task) -> Iterator[Result]:
    """`top1_k20`, `top5_k20`, …, and with several temperatures `top1_k20_t0.07`, …, in percent.

    Every rank has the whole bank, 4 N D bytes, and finds the neighbors of its part of the queries.
    """
    images = open_labeled(task)
    bank = bank_indices(config, images, seed=task.seed)
    queries = labeled_subset(images.labels("val"), limit=config.queries, seed=task.seed)
    _check_k(config, bank=len(bank))
    bank_ND, bank_labels_N = split_features(task, config, images, "train", indices=bank)
    queries_MD, query_labels_M = split_features(task, config, images, "val", indices=queries)
    _check_k(config, bank=len(bank_ND))  # unreadable images are missing now
    local = slice(rank(), None, world_size())
    similarity_MK, neighbors_MK = nearest_neighbors(
        bank_ND, queries_MD[local], k=max(config.k), device=task.context.search_device
    )
    headline = HEADLINE_K if HEADLINE_K in config.k else config.k[0]
    details = {"bank": len(bank_ND), "queries": len(queries_MD), "classes": len(images.classes)}
    for temperature in config.temperatures:
        accuracy = vote_accuracy(
            similarity_MK,
            neighbors_MK,
            bank_labels_N,
            query_labels_M[local],
            k=config.k,
            temperature=temperature,
            num_classes=len(images.classes),
        )
        suffix = f"_t{temperature:g}" if len(config.temperatures) > 1 else ""
        for k, top in accuracy.items():
            for name, value in top.items():
                yield Result(f"{name}_k{k}{suffix}", value, main=k == headline, details=details)


def _check_k(config: KNNEval, *, bank: int) -> None:
    if max(config.k) > bank:
        raise UserError(
            f"eval.k={max(config.k)}: there are {bank} training images to choose neighbors from; set eval.k to at most "
            f"{bank}."
        )


def bank_indices(config: KNNEval, images: LabeledSplits, *, seed: int) -> list[int]:
    """Indices of the training images in the bank, ascending; the same on every rank."""
    if config.n_per_class is None:
        return labeled_subset(images.labels("train"), limit=config.bank, seed=seed)
    selected = balanced_subset(images, n=config.n_per_class, seed=seed)
    return [int(selected[i]) for i in subset_indices(len(selected), limit=config.bank, seed=seed)]


def balanced_subset(images: LabeledSplits, *, n: int, seed: int) -> np.ndarray:
    """Indices of `n` training images of each class, drawn by seed, ascending."""
    labels = images.labels("train")
    labeled = np.flatnonzero(labels >= 0)
    sizes = np.bincount(labels[labeled], minlength=len(images.classes))
    smallest = int(sizes.min())
    if smallest < n:
        choice = f"at most {smallest}, or to null for all" if smallest else "null for all"
        raise UserError(
            f"eval.n_per_class={n}: the class '{images.classes[sizes.argmin()]}' has {smallest} training images; set "
            f"it to {choice}."
        )
    order = np.random.default_rng(seed).permutation(labeled)
    return np.sort(np.concatenate([order[labels[order] == label][:n] for label in range(len(images.classes))]))
