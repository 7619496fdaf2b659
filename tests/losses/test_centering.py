"""The center: equation 4, and when it moves."""

import oracles
import pytest
import torch
from torch import Tensor

from dino_lightning.losses.centering import Center
from dino_lightning.losses.cross_view import SoftmaxParams, cross_view_entropy
from dino_lightning.models.factored_logits import FactoredLogits

K = 5


def _center(momentum: float = 0.9) -> Center:
    return Center(K, momentum=momentum).double()


def _logits(B: int = 8) -> Tensor:
    return torch.randn(B, K, dtype=torch.float64)


def _observe(center: Center, logits_BK: Tensor) -> None:
    """One micro-batch, whose embeddings are the logits."""
    center.center_for(FactoredLogits(logits_BK, torch.eye(K, dtype=logits_BK.dtype)), temperature=0.04)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_the_center_follows_equation_4(momentum: float) -> None:
    center, expected = _center(momentum), [0.0] * K
    assert torch.equal(center.center, torch.zeros(1, K, dtype=torch.float64))
    for _ in range(5):
        batch = _logits()
        _observe(center, batch)
        center.update()
        expected = oracles.move_center(expected, batch.tolist(), momentum=momentum)
        torch.testing.assert_close(center.center[0].tolist(), expected, rtol=1e-12, atol=1e-15)


def test_four_micro_batches_equal_one_batch() -> None:
    whole, parts, batch = _center(), _center(), _logits(16)
    _observe(whole, batch)
    whole.update()
    for part in batch.chunk(4):
        _observe(parts, part)
    parts.update()
    torch.testing.assert_close(parts.center, whole.center, rtol=1e-13, atol=0)


def test_micro_batches_are_weighted_by_their_images() -> None:
    """A mean of means would weigh the short last batch too much."""
    center, batch = _center(), _logits(8)
    for part in batch.split([6, 2]):
        _observe(center, part)
    center.update()
    expected = oracles.move_center([0.0] * K, batch.tolist(), momentum=0.9)
    torch.testing.assert_close(center.center[0].tolist(), expected, rtol=1e-12, atol=1e-15)
    of_means = torch.stack([part.mean(0) for part in batch.split([6, 2])]).mean(0) * 0.1
    assert (center.center[0] - of_means).abs().max() > 1e-3


def test_the_loss_sees_the_old_center_until_commit() -> None:
    center, student, teacher = _center(), torch.randn(2, 4, K).double(), torch.randn(2, 4, K).double()

    def loss() -> Tensor:
        sharpness = SoftmaxParams(student_temperature=0.1, teacher_temperature=0.04, center=center.center)
        return cross_view_entropy(student, teacher, sharpness)

    before = loss()
    _observe(center, teacher.flatten(0, 1))
    assert torch.equal(loss(), before)
    center.update()
    assert not torch.equal(loss(), before)


def test_observe_needs_only_the_sum() -> None:
    """As the caller may know it for less than the logits."""
    of_logits, of_sums = _center(), _center()
    for part in _logits().split([6, 2]):
        _observe(of_logits, part)
        of_sums.observe(part.sum(0, keepdim=True), count=len(part))
    for center in (of_logits, of_sums):
        center.update()
    assert torch.equal(of_sums.center, of_logits.center)


def test_observe_copies_the_sum() -> None:
    center, expected, sum_1K = _center(), _center(), _logits(1)
    expected.observe(sum_1K.clone(), count=1)
    center.observe(sum_1K, count=1)
    sum_1K.zero_()
    for moved in (center, expected):
        moved.update()
    assert torch.equal(center.center, expected.center)


def test_commit_without_observe_does_nothing() -> None:
    center = _center()
    center.update()
    assert torch.equal(center.center, torch.zeros(1, K, dtype=torch.float64))
    _observe(center, _logits())
    center.update()
    moved = center.center.clone()
    center.update()
    assert torch.equal(center.center, moved)


def test_only_the_center_is_saved_under_the_original_name() -> None:
    center = _center()
    _observe(center, _logits())
    center.update()
    _observe(center, _logits())  # pending: part of no checkpoint
    assert list(center.state_dict()) == ["center"]
    assert center.state_dict()["center"].shape == (1, K)
    copy = _center()
    copy.load_state_dict(center.state_dict())
    assert torch.equal(copy.center, center.center)
    assert not list(center.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    """The logits are rounded by their own precision once; their mean is good to float32."""
    center, batch = Center(K, momentum=0.0), (torch.rand(300, K) + 1).to(dtype)
    for part in batch.chunk(3):
        _observe(center, part)
    center.update()
    torch.testing.assert_close(center.center, batch.double().mean(0, keepdim=True).float(), rtol=1e-6, atol=0)


def test_the_center_has_no_graph() -> None:
    center = _center()
    _observe(center, _logits().requires_grad_())
    center.update()
    assert not center.center.requires_grad
