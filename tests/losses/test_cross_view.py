"""The cross-entropy between views against a double loop over pairs of views."""

import itertools

import oracles
import pytest
import torch
from torch import Tensor

from dino_lightning.losses.cross_view import SoftmaxParams, cross_view_entropy, sharpen
from dino_lightning.losses.output_statistics import entropy_and_divergence
from dino_lightning.models.factored_logits import FactoredLogits

EXACT = {"rtol": 1e-12, "atol": 1e-12}
"""Two orders of the same sums in float64."""


def _logits(V: int, T: int = 2, *, B: int = 3, K: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines, as the head gives them, and a center among them."""
    return (
        (torch.rand(V, B, K, dtype=torch.float64) * 2 - 1).requires_grad_(),
        torch.rand(T, B, K, dtype=torch.float64) * 2 - 1,
        torch.randn(1, K, dtype=torch.float64) / 5,
    )


def _sharp(center: Tensor) -> SoftmaxParams:
    return SoftmaxParams(student_temperature=0.1, teacher_temperature=0.04, center=center)


def _factors(logits_SK: Tensor) -> FactoredLogits:
    """Factors whose product these logits are."""
    return FactoredLogits(logits_SK, torch.eye(logits_SK.shape[1], dtype=logits_SK.dtype))


def _oracle(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    return oracles.dino_loss(student, teacher, tau_s=0.1, tau_t=0.04, center_K=center[0])


@pytest.mark.parametrize(("V", "T"), [(2, 2), (3, 2), (10, 2), (2, 1), (4, 3)])
def test_value_and_gradient_equal_the_double_loop(V: int, T: int) -> None:
    student, teacher, center = _logits(V, T)
    ours = cross_view_entropy(student, teacher, _sharp(center))
    expected = _oracle(student, teacher, center)
    torch.testing.assert_close(ours, expected, **EXACT)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, student)[0] for loss in (ours, expected)), rtol=1e-11, atol=1e-12
    )


def test_gradient_is_the_derivative() -> None:
    student, teacher, center = _logits(3, B=2, K=4)
    assert torch.autograd.gradcheck(lambda s: cross_view_entropy(s, teacher, _sharp(center)), (student,))


def test_a_view_is_not_compared_with_itself() -> None:
    """With two views each student view sees the other teacher view only: swapping the teacher's views shows it."""
    student, teacher, center = _logits(2)
    one = cross_view_entropy(student[:1].expand(2, -1, -1), teacher, _sharp(center))
    entropies = [_entropy(student[0], teacher[t], center) for t in (0, 1)]
    torch.testing.assert_close(one, (entropies[0] + entropies[1]) / 2, **EXACT)
    apart = cross_view_entropy(student, teacher, _sharp(center))
    torch.testing.assert_close(
        apart, (_entropy(student[1], teacher[0], center) + _entropy(student[0], teacher[1], center)) / 2, **EXACT
    )
    swapped = cross_view_entropy(student, teacher.flip(0), _sharp(center))
    assert abs(apart - swapped) > 1e-3


def _entropy(student_BK: Tensor, teacher_BK: Tensor, center: Tensor) -> Tensor:
    p = ((teacher_BK - center) / 0.04).softmax(-1)
    return -(p * (student_BK / 0.1).log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize("V", [2, 4, 10])
def test_mean_over_2_times_v_minus_1_terms(V: int) -> None:
    """Every term is ln K where the student is uniform, so the mean is ln K whatever the number of views."""
    _, teacher, center = _logits(V)
    loss = cross_view_entropy(torch.zeros(V, 3, 7, dtype=torch.float64), teacher, _sharp(center))
    assert loss.item() == pytest.approx(torch.tensor(7.0, dtype=torch.float64).log().item(), rel=1e-12)
    pairs = [(t, v) for t, v in itertools.product(range(2), range(V)) if t != v]
    assert len(pairs) == 2 * (V - 1)
    student, teacher, center = _logits(V)
    by_hand = sum(_entropy(student[v], teacher[t], center) for t, v in pairs) / (2 * (V - 1))
    torch.testing.assert_close(cross_view_entropy(student, teacher, _sharp(center)), by_hand, **EXACT)


def test_the_teacher_takes_no_gradient() -> None:
    student, teacher, center = _logits(3)
    teacher.requires_grad_()
    center.requires_grad_()
    cross_view_entropy(student, teacher, _sharp(center)).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert center.grad is None


def test_the_center_is_subtracted_before_sharpening() -> None:
    _, teacher, center = _logits(2)
    expected = torch.stack([((row - center[0]) / 0.04).softmax(0) for row in teacher.flatten(0, 1)])
    torch.testing.assert_close(sharpen(teacher, _sharp(center)).flatten(0, 1), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_to_float32_first(dtype: torch.dtype) -> None:
    """The logits are rounded by their own precision once, and nothing after that."""
    student, teacher, center = (x.detach() for x in _logits(4))
    center = center.float()
    ours = cross_view_entropy(student.to(dtype), teacher.to(dtype), _sharp(center))
    rounded = cross_view_entropy(student.to(dtype).float(), teacher.to(dtype).float(), _sharp(center))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, rounded)
    # Under trainer.precision=16-true or bf16-true the center is half too.
    assert sharpen(teacher.to(dtype), _sharp(center.to(dtype))).dtype == torch.float32


def test_float64_stays_float64() -> None:
    student, teacher, center = _logits(4)
    assert cross_view_entropy(student, teacher, _sharp(center)).dtype == torch.float64


def test_finite_where_a_softmax_underflows() -> None:
    """Logits of 1e3 over temperatures of 0.04: the log of a softmax that is 0 would be -inf."""
    student, teacher, center = (x.detach() * 1e3 for x in _logits(4))
    ours = cross_view_entropy(student, teacher, _sharp(center))
    assert torch.isfinite(ours)
    torch.testing.assert_close(ours, _oracle(student, teacher, center), **EXACT)


def test_entropy_and_divergence_add_up_to_the_loss() -> None:
    student, teacher, center = (x.detach() for x in _logits(2))
    entropy, divergence, mean = entropy_and_divergence(
        _factors(student.flatten(0, 1)), _factors(teacher.flatten(0, 1)), _sharp(center), rows=4
    )
    p = sharpen(teacher, _sharp(center)).flatten(0, 1)
    q = (student.flatten(0, 1) / 0.1).softmax(-1)
    by_image = [sum(-a * a.log() for a in row) for row in p]
    torch.testing.assert_close(entropy, torch.stack(by_image).mean(), **EXACT)
    kl = [sum(a * (a.log() - b.log()) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)]
    torch.testing.assert_close(divergence, torch.stack(kl).mean(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mean, sum(row for row in p) / len(p), **EXACT)
    swapped = cross_view_entropy(student.flip(0), teacher, _sharp(center))
    torch.testing.assert_close(entropy + divergence, swapped, **EXACT)


@pytest.mark.parametrize(("logits", "expected"), [(torch.zeros(4, 9), 2.1972246), (torch.eye(9)[:4] * 50, 0.0)])
def test_the_two_collapses(logits: Tensor, expected: float) -> None:
    """ln K: uniform; 0: one prototype. The student being the teacher, the divergence is 0."""
    same = SoftmaxParams(student_temperature=0.1, teacher_temperature=0.1, center=torch.zeros(1, 9))
    entropy, divergence, mean = entropy_and_divergence(_factors(logits), _factors(logits), same, rows=640)
    assert mean.sum().item() == pytest.approx(1)
    assert entropy.item() == pytest.approx(expected, abs=1e-6)
    assert divergence.item() == pytest.approx(0, abs=1e-6)
