"""Signals against loops over their definitions, and the names that signals get."""

import math
from typing import Any

import pytest
import torch
from collapse_cases import RecordedMetrics

from dino_lightning.losses.cross_view import SoftmaxParams
from dino_lightning.methods import feature_buffer as window
from dino_lightning.methods.collapse import (
    ALIKE,
    CONSTANT,
    KINDS,
    LOW_RANK,
    ONE_PROTOTYPE,
    UNIFORM,
    changes,
    dead_prototypes,
    diagnose,
    effective_rank,
)
from dino_lightning.methods.collapse_signals import (
    log_assignment_statistics,
    log_feature_statistics,
    log_output_statistics,
)
from dino_lightning.methods.feature_buffer import FeatureBuffer
from dino_lightning.models.factored_logits import FactoredLogits

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def softmax(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(x / temperature) for x in logits]
    return [x / sum(powers) for x in powers]


def test_output_signals_equal_their_definitions() -> None:
    """For seven crops in pieces of three: the last is a piece of one."""
    torch.manual_seed(0)
    K = 6
    student, teacher = (torch.rand(7, K, dtype=torch.float64) for _ in range(2))
    center = torch.randn(1, K, dtype=torch.float64) / 5
    eye = torch.eye(K, dtype=torch.float64)
    metrics = RecordedMetrics(rows=3)
    log_output_statistics(
        metrics, FactoredLogits(student, eye), FactoredLogits(teacher, eye), SoftmaxParams(0.1, 0.06, center)
    )
    p = [softmax([x - c for x, c in zip(row, center[0].tolist(), strict=True)], 0.06) for row in teacher.tolist()]
    q = [softmax(row, 0.1) for row in student.tolist()]
    mean = [sum(row[k] for row in p) / 7 for k in range(K)]
    ratios = [(a, a / b) for x, y in zip(p, q, strict=True) for a, b in zip(x, y, strict=True)]
    expected = {
        "teacher_entropy": sum(map(entropy, p)) / 7,
        "teacher_student_kl": sum(a * math.log(ratio) for a, ratio in ratios) / 7,
        "mean_output_entropy": entropy(mean),
        "kl_to_uniform": sum(m * math.log(m * K) for m in mean),
        "center_norm": math.sqrt(sum(c * c for c in center[0].tolist())),
    }
    assert {name: value.item() for name, value in metrics.recorded.items()} == pytest.approx(expected, rel=1e-11)


def test_signals_of_assignments_equal_those_of_outputs() -> None:
    torch.manual_seed(0)
    K = 5
    scores, teacher = (torch.rand(4, K, dtype=torch.float64) for _ in range(2))
    eye, zero = torch.eye(K, dtype=torch.float64), torch.zeros(1, K, dtype=torch.float64)
    first, second = RecordedMetrics(), RecordedMetrics()
    log_output_statistics(
        first, FactoredLogits(scores, eye), FactoredLogits(teacher, eye), SoftmaxParams(0.1, 0.05, zero)
    )
    log_assignment_statistics(second, (teacher / 0.05).softmax(-1), scores, temperature=0.1)
    del first.recorded["center_norm"]
    assert first.recorded.keys() == second.recorded.keys()
    for name, value in first.recorded.items():
        torch.testing.assert_close(value, second.recorded[name], rtol=1e-11, atol=1e-12)


def test_spread_is_the_deviation_of_unit_vectors() -> None:
    torch.manual_seed(0)
    features = torch.randn(5, 3, dtype=torch.float64) + 1
    metrics = RecordedMetrics()
    log_feature_statistics(metrics, features)
    unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in features.tolist()]
    deviations = []
    for column in zip(*unit, strict=True):
        mean = sum(column) / 5
        deviations.append(math.sqrt(sum((x - mean) ** 2 for x in column) / 4))
    assert metrics.recorded["feature_std"].item() == pytest.approx(sum(deviations) / 3, rel=1e-12)


def test_effective_rank_counts_directions() -> None:
    """Of r orthogonal directions of equal length it is r, whatever the rotation; of one direction 1."""
    torch.manual_seed(0)
    for rank in (1, 2, 5):
        rows = torch.linalg.qr(torch.randn(40, rank, dtype=torch.float64))[0]
        columns = torch.linalg.qr(torch.randn(8, rank, dtype=torch.float64))[0]
        torch.testing.assert_close(effective_rank(rows @ columns.T).item(), float(rank), rtol=1e-9, atol=0)


def test_effective_rank_equals_its_definition() -> None:
    """With the singular values as roots of the eigenvalues of the Gram matrix."""
    torch.manual_seed(0)
    x = torch.randn(20, 4, dtype=torch.float64) * torch.tensor([1.0, 0.5, 3.0, 0.1])
    values = [math.sqrt(value) for value in torch.linalg.eigvalsh(x.T @ x).tolist()]
    expected = math.exp(entropy([value / sum(values) for value in values]))
    assert effective_rank(x).item() == pytest.approx(expected, rel=1e-10)
    assert effective_rank(torch.zeros(5, 3)).item() == 1.0


def test_dead_prototypes_get_less_than_a_hundredth_of_their_share() -> None:
    total = torch.tensor([4.0, 4.0, 2.0, 0.024, 0.0])  # an even share is 2.0048
    assert dead_prototypes(total).item() == pytest.approx(1 / 5)
    assert dead_prototypes(torch.tensor([4.0, 4.0, 2.0, 0.0199, 0.0])).item() == pytest.approx(2 / 5)


def test_a_window_keeps_the_latest_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "MAX_FEATURES", 10)
    seen = FeatureBuffer()
    assert seen.take_effective_rank() is None
    batches = [torch.randn(4, 6, dtype=torch.float64) for _ in range(5)]
    for features in batches:
        passed = features.clone()
        seen.add_features(passed)
        passed.zero_()  # what a step does with them later does not matter
    assert seen.width == 6
    expected = effective_rank(torch.cat(batches)[-10:]).item()
    assert seen.take_effective_rank() == pytest.approx(expected, rel=1e-12)
    assert seen.take_effective_rank() is None, "they were taken"


def test_a_window_waits_for_as_many_features_as_they_are_wide() -> None:
    seen = FeatureBuffer()
    seen.add_features(torch.randn(4, 6))
    assert seen.take_effective_rank() is None
    seen.add_features(torch.randn(2, 6))
    assert seen.take_effective_rank() is not None


def test_a_window_waits_for_a_crop_for_each_prototype() -> None:
    seen = FeatureBuffer()
    assert seen.take_dead_prototypes() is None
    seen.add_output(torch.tensor([1.0, 0.0, 0.0, 0.0]), crops=3)
    assert seen.take_dead_prototypes() is None
    seen.add_output(torch.tensor([0.0, 1.0, 0.0, 0.0]), crops=1)
    assert seen.take_dead_prototypes() == pytest.approx(1 / 2)
    seen.add_output(torch.tensor([0.25] * 4), crops=4)
    assert seen.take_dead_prototypes() == 0.0, "counting starts from zero"


LN_K = math.log(256)


def outputs(of_the_mean: float, one: float) -> dict[str, float]:
    return {"mean_output_entropy": of_the_mean, "teacher_entropy": one, "kl_to_uniform": LN_K - of_the_mean}


@pytest.mark.parametrize(
    ("signals", "kind"),
    [
        (outputs(0.0, 0.0), ONE_PROTOTYPE),
        (outputs(0.3, 0.28), ONE_PROTOTYPE),
        (outputs(0.3, 0.1), None),
        (outputs(LN_K, LN_K), UNIFORM),
        (outputs(LN_K, LN_K - 0.04), UNIFORM),
        (outputs(LN_K, LN_K - 0.06), None),
        (outputs(2.5, 2.5), CONSTANT),
        (outputs(2.5, 2.2), None),
        ({"feature_std": 0.1 / 8}, ALIKE),
        ({"feature_std": 0.2 / 8}, None),
        ({"effective_rank": 1.5}, LOW_RANK),
        ({"effective_rank": 2.5}, None),
        ({"feature_std": 0.1 / 8, "effective_rank": 1.5}, ALIKE),
        ({**outputs(LN_K, LN_K), "feature_std": 0.0}, UNIFORM),
        ({**outputs(5.4, 5.0), "feature_std": 0.0}, ALIKE),
        ({}, None),
    ],
)
def test_names(signals: dict[str, float], kind: Any) -> None:
    assert diagnose(signals, width=64) is kind


def test_similar_images_are_not_a_collapse() -> None:
    signals = {"feature_std": 0.1 / 8}
    assert diagnose(signals, width=64, spread_at_start=0.15 / 8) is None
    assert diagnose(signals, width=64, spread_at_start=0.21 / 8) is ALIKE


HEALTHY = {
    "method.centering": "center",
    "method.center_momentum": 0.9,
    "method.teacher_update": "ema",
    "method.teacher_temperature": 0.04,
    "method.predictor": False,
    "method.head_batch_norm": False,
    "optim.lr": 0.001,
}


@pytest.mark.parametrize(
    ("kind", "method", "wrong", "first"),
    [
        (ONE_PROTOTYPE, "DINO", {"method.centering": "none"}, "set method.centering=center (now none)"),
        (ONE_PROTOTYPE, "DINO", {"method.center_momentum": 0.999}, "lower method.center_momentum to 0.9 (now 0.999)"),
        (UNIFORM, "DINO", {"method.teacher_temperature": 0.1}, "lower method.teacher_temperature to 0.04 (now 0.1)"),
        (UNIFORM, "DINO", {"method.predictor": True}, "set method.predictor=false (now true)"),
        (CONSTANT, "DINO", {"method.teacher_update": "copy_each_step"}, "set method.teacher_update=ema"),
        (ALIKE, "BYOL", {}, "set method.predictor=true (now false)"),
        (ALIKE, "DINO", {}, "lower optim.lr (now 0.001)"),
        (LOW_RANK, "BYOL", {"method.predictor": True}, "set method.head_batch_norm=true (now false)"),
    ],
)
def test_the_wrong_setting_is_named_first(kind: Any, method: str, wrong: dict[str, Any], first: str) -> None:
    assert changes(kind, HEALTHY | wrong, method=method)[0].startswith(first)


def test_only_existing_settings_are_named() -> None:
    for kind in KINDS.values():
        assert changes(kind, {"optim.lr": 0.5}, method="Mine") == ["lower optim.lr (now 0.5)"]
