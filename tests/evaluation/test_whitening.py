"""PCA whitening against loops over numbers, and by what it must do to a covariance."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_lightning.evaluation.retrieval.whitening import FLOOR, learn_whitening


def _features(n: int, width: int, *, seed: int = 0) -> Tensor:
    """Correlated, of unequal variances, and far from 0."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((n, width)) * np.geomspace(1, 0.1, width) @ rng.standard_normal((width, width))
    return torch.from_numpy(mixed + 3 * rng.standard_normal(width)).float()


def _covariance(features: np.ndarray, *, around: np.ndarray) -> np.ndarray:
    n, width = features.shape
    covariance = np.zeros((width, width))
    for row in features:
        for i in range(width):
            for j in range(width):
                covariance[i, j] += (row[i] - around[i]) * (row[j] - around[j]) / n
    return covariance


def _whitened(learnt_on: np.ndarray, features: np.ndarray, *, corrected: bool) -> np.ndarray:
    """One number at a time: each direction's coordinate, divided by the root of its floored eigenvalue."""
    mean = np.array([sum(column) / len(column) for column in learnt_on.T])
    around = mean if corrected else np.zeros_like(mean)
    values, vectors = np.linalg.eigh(_covariance(learnt_on, around=around))
    result = np.zeros_like(features)
    for place, direction in enumerate(np.argsort(values)[::-1]):
        variance = max(values[direction], 1e-5 * values.max())
        for i, row in enumerate(features):
            coordinate = sum((row[d] - mean[d]) * vectors[d, direction] for d in range(len(mean)))
            result[i, place] = coordinate * variance**-0.5
    return result


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("learnt_on", [200, 3])
def test_whitening_equals_the_loops(corrected: bool, learnt_on: int) -> None:
    """With three images for six dimensions the floor decides about most directions."""
    bank, features = _features(learnt_on, 6), _features(20, 6, seed=1)
    got = learn_whitening(bank, corrected=corrected)(features).numpy()
    want = _whitened(bank.double().numpy(), features.double().numpy(), corrected=corrected)
    # The directions whose eigenvalues are floored are equal in value, so any basis of them will do: compare products.
    np.testing.assert_allclose(got @ got.T, want @ want.T, rtol=1e-7, atol=1e-7 * np.abs(want @ want.T).max())
    if learnt_on > 6:
        # An eigenvector's sign is anyone's choice.
        np.testing.assert_allclose(np.abs(got), np.abs(want), rtol=1e-7, atol=1e-9)


def test_corrected_whitening_makes_the_covariance_the_identity() -> None:
    bank = _features(300, 8)
    white = learn_whitening(bank, corrected=True)(bank)
    torch.testing.assert_close(white.mean(dim=0), torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(white.T @ white / 300, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_original_is_another_operator() -> None:
    """Its covariance around 0 is ruled by the mean: that direction comes out small."""
    bank = _features(300, 8)
    white = learn_whitening(bank, corrected=False)(bank)
    variance = (white.T @ white / 300).diagonal()
    assert variance[0] < 0.5
    assert variance.max() < 1.01


def test_the_mean_of_the_whitening_images_is_subtracted() -> None:
    bank = _features(50, 4)
    for corrected in (False, True):
        whiten = learn_whitening(bank, corrected=corrected)
        torch.testing.assert_close(whiten(bank.double().mean(dim=0, keepdim=True)), torch.zeros(1, 4).double())


def test_a_direction_without_variance_is_not_amplified() -> None:
    bank = _features(100, 4)
    bank[:, 2] = 1
    whiten = learn_whitening(bank, corrected=True)
    values = torch.linalg.eigvalsh(torch.cov(bank.double().T, correction=0))
    assert float(whiten.projection.norm(dim=1).max()) == pytest.approx(float(values.max() * FLOOR) ** -0.5, rel=1e-9)
