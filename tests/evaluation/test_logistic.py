"""Logistic regression: the minimum of its equation, equal to scikit-learn's; test images do not choose c."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_tools import tiny_network, tiny_task
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

from dino_lightning.config import BuiltinData, LogisticEval
from dino_lightning.errors import UserError
from dino_lightning.evaluation.classification import lbfgs as solver
from dino_lightning.evaluation.classification import logistic
from dino_lightning.evaluation.classification.lbfgs import (
    LogisticClassifier,
    fit,
    fit_sklearn,
    stratified_folds,
)
from dino_lightning.evaluation.classification.logistic import choose_c, draw_per_class, evaluate
from dino_lightning.evaluation.context import Result

CPU = torch.device("cpu")
DATA = BuiltinData(train_images=120, val_images=48, image_size=32, num_workers=0)


@pytest.fixture(autouse=True)
def _one_thread_for_scikit_learn() -> Iterator[None]:
    with threadpool_limits(1):
        yield


def _points(n: int, *, classes: int, width: int = 6, noise: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit vectors around one center per class, which do not depend on the seed; each class has an image."""
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    points = centers[labels] + noise * torch.randn(n, width, generator=generator)
    return torch.nn.functional.normalize(points, dim=1), labels


def _slow_objective(classifier: LogisticClassifier, x: Tensor, y: Tensor, *, c: float) -> float:
    """From the equation, one image and class at a time."""
    weights, biases = classifier.weights.double().numpy(), classifier.biases.double().numpy()
    total = 0.0
    for features, label in zip(x.double().numpy(), y.tolist(), strict=True):
        scores = [float(features @ weights[:, k] + biases[k]) for k in range(len(biases))]
        total -= scores[label] - np.log(sum(np.exp(score) for score in scores))
    return c * total + 0.5 * float((weights**2).sum())


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_both_solvers_find_one_minimum(classes: int, c: float) -> None:
    x, y = _points(120, classes=classes)
    options: dict[str, Any] = {"num_classes": classes, "c": c, "max_iterations": 5000}
    ours, theirs = fit(x, y, device=CPU, **options), fit_sklearn(x, y, **options)
    assert ours.converged
    assert theirs.converged
    values = [_slow_objective(each, x, y, c=c) for each in (ours, theirs)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    # No point nearby is lower.
    for _ in range(10):
        step_DK, step_K = 1e-2 * torch.randn_like(ours.weights), 1e-2 * torch.randn_like(ours.biases)
        assert _slow_objective(LogisticClassifier(ours.weights + step_DK, ours.biases + step_K), x, y, c=c) > values[0]
    new, _ = _points(300, classes=classes, seed=1)
    best = theirs.logits(new).topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-4  # more than the solvers' tolerance of 1e-6
    assert clear.sum() > 250
    assert torch.equal(ours.logits(new[clear]).argmax(1), theirs.logits(new[clear]).argmax(1))


def test_predictions_equal_scikit_learn() -> None:
    x, y = _points(90, classes=5)
    new, _ = _points(200, classes=5, seed=1)
    model = LogisticRegression(C=3.0, max_iter=5000, tol=1e-8).fit(x.double().numpy(), y.numpy())
    ours = fit(x, y, num_classes=5, c=3.0, max_iterations=5000, device=CPU)
    assert ours.logits(new).argmax(1).tolist() == model.predict(new.double().numpy()).tolist()
    probabilities = torch.from_numpy(model.predict_proba(new.double().numpy()))
    # Both stop at a gradient of 1e-6 or less, and probabilities move less than the weights.
    torch.testing.assert_close(ours.logits(new).softmax(1), probabilities, rtol=0, atol=1e-4)


def test_chunks_and_a_start_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = _points(120, classes=4)
    options: dict[str, Any] = {"num_classes": 4, "max_iterations": 5000, "device": CPU}
    whole = fit(x, y, c=10.0, **options)
    started = fit(x, y, c=10.0, initial=fit(x, y, c=1.0, **options), **options)
    monkeypatch.setattr(solver, "CHUNK_VALUES", 28)
    for other in (started, fit(x, y, c=10.0, **options)):
        # To the tolerance of the gradient, 1e-6, over the least curvature, that of the penalty: 1 / (c N).
        torch.testing.assert_close(other.weights, whole.weights, rtol=0, atol=2e-3)
        assert _slow_objective(other, x, y, c=10.0) == pytest.approx(_slow_objective(whole, x, y, c=10.0), rel=1e-7)


def test_too_few_iterations_are_reported() -> None:
    x, y = _points(60, classes=3)
    assert not fit(x, y, num_classes=3, c=100.0, max_iterations=2, device=CPU).converged
    assert not fit_sklearn(x, y, num_classes=3, c=100.0, max_iterations=2).converged


def test_an_absent_class_is_never_predicted() -> None:
    x, y = _points(60, classes=3)
    for present in ([0, 2], [0]):
        keep = torch.isin(y, torch.tensor(present))
        options: dict[str, Any] = {"num_classes": 3, "c": 1.0, "max_iterations": 1000}
        for found in (fit(x[keep], y[keep], device=CPU, **options), fit_sklearn(x[keep], y[keep], **options)):
            assert set(found.logits(x).argmax(1).tolist()) <= set(present)


def test_draw_takes_a_share_of_each_class() -> None:
    labels = np.repeat([0, 1, 2], [100, 40, 3])
    drawn = draw_per_class(labels, share=0.1, seed=0)
    assert np.bincount(labels[drawn]).tolist() == [10, 4, 1], "at least one of each"
    assert drawn.tolist() == sorted(set(drawn.tolist())) == draw_per_class(labels, share=0.1, seed=0).tolist()
    assert drawn.tolist() != draw_per_class(labels, share=0.1, seed=1).tolist()
    assert draw_per_class(labels, share=1.0, seed=5).tolist() == list(range(143))
    # 300 draws of 10 of 100: each 30 times on average, with a standard deviation of 5.2.
    counts = np.bincount(np.concatenate([draw_per_class(labels[:100], share=0.1, seed=seed) for seed in range(300)]))
    assert counts.min() > 8
    assert counts.max() < 55


def test_folds_are_stratified() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [15, 11, 5]))
    folds = stratified_folds(labels, folds=5, seed=0)
    for label, least in ((0, 3), (1, 2), (2, 1)):
        counts = np.bincount(folds[labels == label], minlength=5)
        assert counts.min() == least
        assert counts.max() - counts.min() <= 1


def _slow_choice(config: LogisticEval, x: Tensor, y: Tensor, *, folds: int, seed: int) -> float:
    """scikit-learn fitted fold by fold; returns the smallest of the best c."""
    fold_n = stratified_folds(y.numpy(), folds=folds, seed=seed)
    right = {}
    for c in sorted(config.c):
        right[c] = 0
        for fold in range(folds):
            inside = fold_n != fold
            model = LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(x[inside].double().numpy(), y[inside].numpy())
            predicted = model.predict(x[~inside].double().numpy())
            right[c] += int((predicted == y[~inside].numpy()).sum())
    assert len(set(right.values())) > 1, "all c are equally good"
    return max(right, key=lambda c: (right[c], -c))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.slow_after_first(2)
def test_c_is_chosen_by_cross_validation(seed: int) -> None:
    config = LogisticEval(c=[100.0, 0.01, 1.0], max_iterations=5000)
    x, y = _points(60, classes=4, noise=1.5, seed=seed)
    found = choose_c(config, x, y, num_classes=4, seed=seed, device=CPU)
    assert found == (_slow_choice(config, x, y, folds=5, seed=seed), 5)


def test_few_images_make_few_folds() -> None:
    config = LogisticEval(c=[0.1, 1.0, 10.0])
    x, y = _points(9, classes=3)
    assert choose_c(config, x, y, num_classes=3, seed=0, device=CPU)[1] == 3
    assert choose_c(config, x[:3], y[:3], num_classes=3, seed=0, device=CPU) == (1.0, 0), "one of each: the middle"
    assert choose_c(LogisticEval(c=[7.0]), x, y, num_classes=3, seed=0, device=CPU) == (7.0, 0)


def _evaluated(folder: Path, **config: Any) -> list[Result]:
    task = tiny_task(folder, tiny_network(), data=DATA, seed=3)
    return list(evaluate(LogisticEval(**config), task))


def test_results_and_details_of_the_evaluation(tmp_path: Path) -> None:
    low, all_labels = _evaluated(tmp_path, shares=[0.05, 1.0], splits=2, c=[1.0, 100.0], max_iterations=50)
    assert [low.metric, all_labels.metric] == ["top1_5pct", "top1_100pct"]
    assert low.main
    splits = low.details["splits"]
    assert [split["seed"] for split in splits] == [3, 4]
    assert [split["images"] for split in splits] == [12, 12], "one of each of twelve classes"
    assert [(split["c"], split["folds"]) for split in splits] == [(100.0, 0)] * 2
    assert "choice_of_c" in low.details
    assert low.value == pytest.approx(np.mean([split["top1"] for split in splits]))
    assert low.details["std"] == pytest.approx(np.std([split["top1"] for split in splits]))
    # All labels in both draws: the same classifier twice, up to the folds that chose its c.
    assert [split["folds"] for split in all_labels.details["splits"]] == [5, 5]
    assert all_labels.details["queries"] == 48
    assert all_labels.value > low.value > 0
    assert all_labels.value > 20, "chance is 8.3"


def test_solvers_give_the_same_figures(tmp_path: Path) -> None:
    device, sklearn = (
        _evaluated(tmp_path, shares=[0.2], splits=1, c=[1.0, 10.0], solver=name) for name in ("device", "sklearn")
    )
    assert device[0].value == pytest.approx(sklearn[0].value)
    assert device[0].details["splits"][0]["c"] == sklearn[0].details["splits"][0]["c"]


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"eval\.solver=sklearn needs scikit-learn"):
        logistic.check(LogisticEval(solver="sklearn"), DATA)
