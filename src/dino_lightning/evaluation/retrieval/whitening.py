"""PCA whitening of features, learned on images that are neither queries nor in the database.

    covariance = V diag(d) V'        each d at least 1e-5 of the largest
    whitened x = diag(d)^-1/2 V' (x - mean)

N features, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-5
"""Smaller eigenvalues are replaced by this share of the largest one."""


@dataclass(frozen=True)
class Whitening:
    """x -> (x - mean) P'."""

    mean: Tensor
    """(D,)."""
    projection: Tensor
    """P, (D, D)."""

    def __call__(self, features_ND: Tensor) -> Tensor:
        """Whitened features (N, D) float64, by descending variance."""
        return (features_ND.double() - self.mean) @ self.projection.T


def learn_whitening(features_ND: Tensor, *, corrected: bool) -> Whitening:
    """Learn the whitening of features, with the covariance around their mean if `corrected`, else around 0.

    The original subtracts the mean but computes the covariance around 0. The largest direction of that covariance is
    the mean itself, in which no variance remains after the subtraction.
    """
    features_ND = features_ND.double()
    mean_D = features_ND.mean(dim=0)
    centered_ND = features_ND - mean_D if corrected else features_ND
    values_D, vectors_DD = torch.linalg.eigh(centered_ND.T @ centered_ND / len(centered_ND))
    values_D = values_D.clamp(min=float(values_D.max()) * FLOOR)
    return Whitening(mean_D, (vectors_DD / values_D.sqrt()).flip(1).T)
