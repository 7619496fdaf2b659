"""Sinkhorn-Knopp as a shift of the logits, against the division of exponentials."""

import math

import oracles_methods as oracles
import pytest
import torch
from torch import Tensor

from dino_lightning.losses.centering import SinkhornCenter, sinkhorn_center
from dino_lightning.models.factored_logits import FactoredLogits

N, K = 9, 6
EXACT = {"rtol": 1e-10, "atol": 1e-13}


def scores() -> Tensor:
    return torch.randn(N, K, dtype=torch.float64)


def assigned(scores_NK: Tensor, *, temperature: float, iterations: int) -> Tensor:
    shift_1K = sinkhorn_center(scores_NK, temperature=temperature, iterations=iterations)
    assert shift_1K.shape == (1, scores_NK.shape[1])
    return ((scores_NK - shift_1K) / temperature).softmax(dim=-1)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_the_shift_equals_the_division(iterations: int, temperature: float) -> None:
    given = scores()
    expected = oracles.sinkhorn(given, epsilon=temperature, iterations=iterations)
    torch.testing.assert_close(assigned(given, temperature=temperature, iterations=iterations), expected, **EXACT)


def test_one_iteration_is_a_softmax_over_the_batch() -> None:
    given = scores()
    expected = oracles.softmax_over_batch(given, temperature=0.1)
    torch.testing.assert_close(assigned(given, temperature=0.1, iterations=1), expected, **EXACT)


def test_many_iterations_balance_the_assignments() -> None:
    found = assigned(scores(), temperature=0.5, iterations=200)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(N).double(), **EXACT)
    torch.testing.assert_close(found.sum(dim=0), torch.full((K,), N / K).double(), rtol=1e-6, atol=0)


def test_float32_does_not_overflow() -> None:
    """exp(20 / 0.04) is 10^217."""
    given = (20 * torch.rand(N, K)).float()
    found = assigned(given, temperature=0.04, iterations=3)
    wanted = assigned(given.double(), temperature=0.04, iterations=3)
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-3)
    with pytest.raises(AssertionError):  # what the division would have given
        torch.testing.assert_close(oracles.sinkhorn(given, epsilon=0.04, iterations=3).double(), wanted)


def test_a_distant_prototype_gets_its_share() -> None:
    given = scores()
    given[:, 0] -= 3
    found = assigned(given, temperature=0.05, iterations=50)
    assert found[:, 0].sum() > 0.9 * N / K
    assert (given / 0.05).softmax(dim=-1)[:, 0].sum() < 1e-6


def test_the_centering_computes_logits_from_factors() -> None:
    points, prototypes = torch.randn(N, 4).double(), torch.randn(K, 4).double()
    center = SinkhornCenter(K, iterations=3).double()
    shift = center.center_for(FactoredLogits(points, prototypes), temperature=0.3)
    expected = sinkhorn_center(points @ prototypes.T, temperature=0.3, iterations=3)
    torch.testing.assert_close(shift, expected, **EXACT)
    assert torch.equal(center.center, shift)
    assert not center.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_balanced_in_float32(dtype: torch.dtype) -> None:
    points, prototypes = torch.randn(N, 4).to(dtype), torch.randn(K, 4).to(dtype)
    center = SinkhornCenter(K, iterations=3)
    shift = center.center_for(FactoredLogits(points, prototypes), temperature=0.05)
    assert shift.dtype == torch.float32
    found = (((points @ prototypes.T).float() - shift) / 0.05).softmax(dim=-1)
    assert found.isfinite().all()
    assert math.isclose(found.sum().item(), N, rel_tol=1e-4)


def test_assignments_have_no_gradient() -> None:
    given = scores().requires_grad_()
    assert not sinkhorn_center(given, temperature=0.1, iterations=3).requires_grad
