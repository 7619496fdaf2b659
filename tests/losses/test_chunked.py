"""Prototypes and loss in pieces are the double loop over pairs of views, and hold no more logits than they may."""

import oracles
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dino_lightning.losses.chunked import chunked_cross_view_entropy, loss_and_gradient_
from dino_lightning.losses.cross_view import SoftmaxParams, cross_view_entropy
from dino_lightning.models.factored_logits import FactoredLogits

WIDTH = 5
EXACT = {"rtol": 1e-10, "atol": 1e-13}
"""Other orders of the same sums in float64."""


def factors(
    V: int, T: int, *, B: int, K: int, dtype: torch.dtype = torch.float64
) -> tuple[FactoredLogits, FactoredLogits, Tensor]:
    """Student (with gradient), teacher and center."""

    def unit(rows: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, WIDTH, dtype=dtype), dim=-1)

    student = FactoredLogits(unit(V * B).requires_grad_(), unit(K).requires_grad_())
    return student, FactoredLogits(unit(T * B), unit(K)), torch.randn(1, K, dtype=dtype) / 5


def sharpness(center: Tensor) -> SoftmaxParams:
    return SoftmaxParams(student_temperature=0.1, teacher_temperature=0.04, center=center)


def gradients(loss: Tensor, student: FactoredLogits) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (student.embeddings, student.prototypes))


@pytest.mark.parametrize("rows", [1, 7, 12, 1000])
@pytest.mark.parametrize(("V", "T", "B"), [(2, 2, 3), (6, 2, 4), (3, 1, 2), (4, 3, 1)])
def test_value_and_gradients_equal_the_double_loop(V: int, T: int, B: int, rows: int) -> None:
    student, teacher, center = factors(V, T, B=B, K=11)
    ours = chunked_cross_view_entropy(student, teacher, sharpness(center), images=B, rows=rows)
    views = [(f.embeddings @ f.prototypes.T).unflatten(0, (-1, B)) for f in (student, teacher)]
    expected = oracles.dino_loss(*views, tau_s=0.1, tau_t=0.04, center_K=center[0])
    torch.testing.assert_close(ours, expected, **EXACT)
    for one, other in zip(gradients(ours, student), gradients(expected, student), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_the_gradient_scales_with_the_loss() -> None:
    """As a gradient scaler and an accumulation of gradients ask for."""
    student, teacher, center = factors(4, 2, B=2, K=11)
    loss, again = (chunked_cross_view_entropy(student, teacher, sharpness(center), images=2, rows=8) for _ in range(2))
    for one, scaled in zip(gradients(loss, student), gradients(again * 1024 / 4, student), strict=True):
        torch.testing.assert_close(one * 256, scaled, **EXACT)


def test_a_second_backward_pass_is_refused() -> None:
    student, teacher, center = factors(2, 2, B=2, K=5)
    loss = chunked_cross_view_entropy(student, teacher, sharpness(center), images=2, rows=8)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        loss.backward()


def test_the_teacher_takes_no_gradient() -> None:
    student, teacher, center = factors(3, 2, B=2, K=5)
    teacher.embeddings.requires_grad_()
    teacher.prototypes.requires_grad_()
    chunked_cross_view_entropy(student, teacher, sharpness(center), images=2, rows=8).backward()
    assert student.embeddings.grad is not None
    assert teacher.embeddings.grad is None
    assert teacher.prototypes.grad is None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_is_close_to_float32(dtype: torch.dtype, tolerance: float) -> None:
    """Logits are rounded to 8 or 11 bits and divided by .1 and .04: some units of their last place remain."""
    student, teacher, center = factors(10, 2, B=4, K=300, dtype=torch.float32)
    full = chunked_cross_view_entropy(student, teacher, sharpness(center), images=4, rows=20)
    with torch.autocast("cpu", dtype=dtype):
        half = chunked_cross_view_entropy(student, teacher, sharpness(center), images=4, rows=20)
    assert half.dtype == torch.float32
    assert abs(half - full) < tolerance * full
    for one, other in zip(gradients(half, student), gradients(full, student), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 3 * tolerance * other.norm()


def test_float16_keeps_the_gradient_of_rare_prototypes() -> None:
    """With K = 65536 a prototype's share is below the smallest normal number of float16."""
    student, teacher, center = factors(2, 2, B=1, K=65536, dtype=torch.float32)
    flat = SoftmaxParams(student_temperature=100.0, teacher_temperature=0.04, center=center)
    with torch.autocast("cpu", dtype=torch.float16):
        half = chunked_cross_view_entropy(student, teacher, flat, images=1, rows=2)
    full = chunked_cross_view_entropy(student, teacher, flat, images=1, rows=2)
    one, other = (gradients(loss, student)[1] for loss in (half, full))
    # Where the teacher has nothing, w softmax(s) = 1 / 65536 is all there is.
    rare = other.norm(dim=1) < 1.01 * other.norm(dim=1).median()
    assert rare.sum() > 60000
    torch.testing.assert_close(one[rare], other[rare], rtol=1e-2, atol=1e-9)


class LargestTensor(TorchDispatchMode):
    """The most numbers in one tensor that an operator made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Run the operator and look at what it gave."""
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("V", [4, 8, 16])
def test_the_largest_tensor_does_not_grow_with_the_number_of_crops(V: int) -> None:
    K, B, rows = 1000, 32, 16
    student, teacher, center = factors(V, 2, B=B, K=K)
    with LargestTensor() as largest:
        loss = chunked_cross_view_entropy(student, teacher, sharpness(center), images=B, rows=rows)
        loss.backward()
    assert largest.numbers == rows * K
    with LargestTensor() as plain:
        logits = student.logits().unflatten(0, (V, B)), teacher.logits().unflatten(0, (2, B))
        cross_view_entropy(*logits, sharpness(center))
    assert plain.numbers == V * B * K


def test_logits_become_their_gradient_in_place() -> None:
    student_VrK, teacher_TrK = torch.rand(3, 2, 7), torch.rand(2, 2, 7)
    s = (student_VrK.clone() / 0.1).requires_grad_()
    p_TrK = ((teacher_TrK - 0.1) / 0.04).softmax(-1)
    terms = [sum((-p_TrK[t] * s[v].log_softmax(-1)).sum(-1) for t in range(2) if t != v) for v in range(3)]
    expected = torch.stack(terms)  # type: ignore[arg-type]
    ours = loss_and_gradient_(
        student_VrK,
        teacher_TrK,
        torch.full((7,), 0.1),
        student_temperature=0.1,
        teacher_temperature=0.04,
        gradient_scale=4.0,
    )
    # Float32: eight roundings of numbers up to 20.
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(student_VrK, 4 * torch.autograd.grad(expected.sum(), s)[0], rtol=1e-4, atol=1e-5)
