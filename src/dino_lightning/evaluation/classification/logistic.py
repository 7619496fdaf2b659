"""`eval=logistic`: logistic regression on frozen features with a share of the labels (the paper's low-shot table).

Features are L2-normalized, not standardized. Cross-validation on the drawn training images selects the penalty; the
validation images are used once, at the end.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_lightning.config import ImagesConfig, LogisticEval
from dino_lightning.errors import UserError
from dino_lightning.evaluation.classification.classifiers import accuracy
from dino_lightning.evaluation.classification.lbfgs import LogisticClassifier, fit, fit_sklearn, stratified_folds
from dino_lightning.evaluation.classification.splits import open_labeled, split_features
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.registry import register_evaluation
from dino_lightning.runtime.collectives import all_reduce_sum, rank, world_size

MAX_FOLDS = 5
"""Folds of the cross-validation, if the smallest class has as many images."""


def check(config: LogisticEval, data: ImagesConfig) -> None:
    """Raise `UserError` if scikit-learn is needed but not installed."""
    if config.solver == "sklearn" and find_spec("sklearn") is None:
        raise UserError(
            "eval.solver=sklearn needs scikit-learn: pip install 'dino-lightning[sklearn]', or set eval.solver=device."
        )


@register_evaluation("logistic", LogisticEval, check=check)
def evaluate(config: LogisticEval, task: Task) -> Iterator[Result]:
    """`top1_1pct`, `top1_10pct`, …: the mean over splits in percent; details have the spread and the selected c.

    Each rank fits the classifiers of some splits.
    """
    images = open_labeled(task)
    train, val = (
        (F.normalize(features, dim=1), labels)
        for features, labels in (split_features(task, config, images, split) for split in ("train", "val"))
    )
    jobs = [(share, seed) for share in config.shares for seed in range(task.seed, task.seed + config.splits)]
    table = torch.zeros(len(jobs), 5, dtype=torch.float64)
    local = range(len(jobs))[rank() :: world_size()]
    with task.context.progress("logistic regressions", total=len(local)) as advance:
        for job in local:
            share, seed = jobs[job]
            drawn = torch.from_numpy(draw_per_class(train[1].numpy(), share=share, seed=seed))
            subset = train[0][drawn], train[1][drawn]
            options = {"num_classes": len(images.classes), "device": task.context.device}
            c, folds = choose_c(config, *subset, seed=seed, **options)
            classifier = _fit(config, *subset, c=c, **options)
            figures = [len(drawn), c, folds, _top1(classifier, *val), classifier.converged]
            table[job] = torch.tensor(figures, dtype=torch.float64)
            advance(1)
    splits = [
        {"seed": seed, "images": int(n), "c": c, "folds": int(folds), "top1": top1, "converged": bool(converged)}
        for (_, seed), (n, c, folds, top1, converged) in zip(jobs, all_reduce_sum(table).tolist(), strict=True)
    ]
    for i, share in enumerate(config.shares):
        yield _result(share, splits[i * config.splits : (i + 1) * config.splits], queries=len(val[1]))


def _result(share: float, splits: list[dict[str, Any]], *, queries: int) -> Result:
    values = [split["top1"] for split in splits]
    details: dict[str, Any] = {"std": float(np.std(values)), "queries": queries, "splits": splits}
    if not all(split["folds"] for split in splits):
        details["choice_of_c"] = "0 folds: a class has only one image, or there is only one c; the middle of eval.c"
    return Result(f"top1_{100 * share:g}pct", float(np.mean(values)), main=True, details=details)


def draw_per_class(labels_N: np.ndarray, *, share: float, seed: int) -> np.ndarray:
    """Indices of `share` of the images of each class, at least one each, drawn by seed; ascending."""
    generator, drawn = np.random.default_rng(seed), []
    for label in np.unique(labels_N):
        members = generator.permutation(np.flatnonzero(labels_N == label))
        drawn.append(members[: max(1, round(share * len(members)))])
    return np.sort(np.concatenate(drawn))


def choose_c(
    config: LogisticEval, x_nD: Tensor, y_n: Tensor, *, num_classes: int, seed: int, device: torch.device
) -> tuple[float, int]:
    """The c with the highest accuracy over the folds (on a tie the stronger penalty), and the number of folds.

    If a class has only one image, cross-validation is impossible: the middle of the list, and 0 folds.
    """
    choices, sizes = sorted(config.c), torch.bincount(y_n)
    folds = min(MAX_FOLDS, int(sizes[sizes > 0].min()))
    if len(choices) == 1 or folds < 2:
        return choices[len(choices) // 2], 0
    fold_n = torch.from_numpy(stratified_folds(y_n.numpy(), folds=folds, seed=seed))
    correct = np.zeros(len(choices))
    for fold in range(folds):
        train_n, test_n = fold_n != fold, fold_n == fold
        classifier = None
        for i, c in enumerate(choices):
            classifier = _fit(
                config, x_nD[train_n], y_n[train_n], num_classes=num_classes, c=c, device=device, initial=classifier
            )
            correct[i] += round(_top1(classifier, x_nD[test_n], y_n[test_n]) / 100 * int(test_n.sum()))
    return choices[int(np.argmax(correct))], folds


def _top1(classifier: LogisticClassifier, features_MD: Tensor, labels_M: Tensor) -> float:
    device = classifier.weights.device
    return float(accuracy(classifier.logits, features_MD, labels_M, topk=(1,), device=device)[0])


def _fit(
    config: LogisticEval,
    x_nD: Tensor,
    y_n: Tensor,
    *,
    num_classes: int,
    c: float,
    device: torch.device,
    initial: LogisticClassifier | None = None,
) -> LogisticClassifier:
    options: dict[str, Any] = {"num_classes": num_classes, "c": c, "max_iterations": config.max_iterations}
    if config.solver == "sklearn":
        return fit_sklearn(x_nD, y_n, **options)
    return fit(x_nD, y_n, device=device, initial=initial, **options)
