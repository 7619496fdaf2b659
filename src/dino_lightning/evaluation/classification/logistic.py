"""Logistic regression on frozen features with a share of the labels (the paper's low-shot table: 1 % and 10 %).

Features are L2-normalized and not standardized. The penalty is chosen by cross-validation among the drawn training
images; the validation images are looked at once, at the end.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_lightning.config import LogisticEval
from dino_lightning.evaluation.classification.lbfgs import Classifier, fit, fit_sklearn, stratified_folds
from dino_lightning.evaluation.classification.splits import class_features, labeled_sources
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.runtime.collectives import all_reduce_sum, rank, world_size

MOST_FOLDS = 5
"""Folds of the cross-validation, where the smallest class has as many images."""
ROWS = 8192
"""Images classified at a time."""


def evaluate(config: LogisticEval, task: Task) -> Iterator[Result]:
    """`top1_1pct`, `top1_10pct`, …: the mean over splits in percent; the spread and the choices in the details.

    Each rank fits the classifiers of some splits.
    """
    if config.solver == "sklearn":
        import_sklearn()
    images = labeled_sources(task)
    found = class_features(task, config, images)
    train, val = ((F.normalize(features, dim=1), labels) for features, labels in (found["train"], found["val"]))
    jobs = [(share, seed) for share in config.shares for seed in range(task.seed, task.seed + config.splits)]
    table = torch.zeros(len(jobs), 5, dtype=torch.float64)
    own = range(len(jobs))[rank() :: world_size()]
    with task.runtime.progress("logistic regressions", total=len(own)) as advance:
        for job in own:
            share, seed = jobs[job]
            drawn = torch.from_numpy(draw(train[1].numpy(), share=share, seed=seed))
            few = train[0][drawn], train[1][drawn]
            options = {"num_classes": len(images.classes), "device": task.runtime.device}
            c, folds = choose_c(config, *few, seed=seed, **options)
            classifier = _fit(config, *few, c=c, **options)
            row = [len(drawn), c, folds, accuracy(classifier, *val), classifier.converged]
            table[job] = torch.tensor(row, dtype=torch.float64)
            advance(1)
    rows = [
        {"seed": seed, "images": int(n), "c": c, "folds": int(folds), "top1": top1, "converged": bool(converged)}
        for (_, seed), (n, c, folds, top1, converged) in zip(jobs, all_reduce_sum(table).tolist(), strict=True)
    ]
    for i, share in enumerate(config.shares):
        splits = rows[i * config.splits : (i + 1) * config.splits]
        yield _result(share, splits, queries=len(val[1]))


def _result(share: float, splits: list[dict[str, Any]], *, queries: int) -> Result:
    values = [split["top1"] for split in splits]
    details: dict[str, Any] = {"std": float(np.std(values)), "queries": queries, "splits": splits}
    if not all(split["folds"] for split in splits):
        details["choice_of_c"] = "0 folds: a class has one image, or there was one c; the middle of eval.c was taken"
    return Result(f"top1_{100 * share:g}pct", float(np.mean(values)), main=True, details=details)


def import_sklearn() -> None:
    """Raise `UserError` before any work where scikit-learn is wanted and missing."""
    fit_sklearn(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), num_classes=1, c=1.0, max_iterations=1)


def draw(labels_N: np.ndarray, *, share: float, seed: int) -> np.ndarray:
    """Positions of `share` of the images of each class, at least one of each, drawn by seed; rising."""
    generator, chosen = np.random.default_rng(seed), []
    for label in np.unique(labels_N):
        members = generator.permutation(np.flatnonzero(labels_N == label))
        chosen.append(members[: max(1, round(share * len(members)))])
    return np.sort(np.concatenate(chosen))


def choose_c(
    config: LogisticEval, x_nD: Tensor, y_n: Tensor, *, num_classes: int, seed: int, device: torch.device
) -> tuple[float, int]:
    """The c of the highest accuracy over the folds (the stronger penalty on a tie), and the number of folds.

    With one image of a class there is nothing to validate on: the middle of the list, and 0 folds.
    """
    choices, sizes = sorted(config.c), torch.bincount(y_n)
    folds = min(MOST_FOLDS, int(sizes[sizes > 0].min()))
    if len(choices) == 1 or folds < 2:
        return choices[len(choices) // 2], 0
    fold_n = torch.from_numpy(stratified_folds(y_n.numpy(), folds=folds, seed=seed))
    right = np.zeros(len(choices))
    for fold in range(folds):
        inside, outside = fold_n != fold, fold_n == fold
        fitted = None
        for i, c in enumerate(choices):
            fitted = _fit(config, x_nD[inside], y_n[inside], num_classes=num_classes, c=c, device=device, start=fitted)
            right[i] += round(accuracy(fitted, x_nD[outside], y_n[outside]) / 100 * int(outside.sum()))
    return choices[int(np.argmax(right))], folds


def accuracy(classifier: Classifier, features_MD: Tensor, labels_M: Tensor) -> float:
    """Top-1 in percent."""
    right = 0
    for features, labels in zip(features_MD.split(ROWS), labels_M.split(ROWS), strict=True):
        right += int((classifier.logits(features).argmax(dim=1).cpu() == labels).sum())
    return 100 * right / len(labels_M)


def _fit(
    config: LogisticEval,
    x_nD: Tensor,
    y_n: Tensor,
    *,
    num_classes: int,
    c: float,
    device: torch.device,
    start: Classifier | None = None,
) -> Classifier:
    options: dict[str, Any] = {"num_classes": num_classes, "c": c, "max_iterations": config.max_iterations}
    if config.solver == "sklearn":
        return fit_sklearn(x_nD, y_n, **options)
    return fit(x_nD, y_n, device=device, start=start, **options)
