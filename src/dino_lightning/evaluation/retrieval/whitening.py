"""PCA whitening of features, learned on images that are neither queries nor database.

    C = covariance = V diag(d) V'    d floored at 1e-5 of the largest
    whitened x = diag(d)^-1/2 V' (x - mean)

N features, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-5
"""Of the largest eigenvalue: smaller ones count as this much."""


@dataclass(frozen=True)
class Whitening:
    """x -> (x - mean) P'."""

    mean: Tensor
    """(D,)."""
    projection: Tensor
    """P, (D, D)."""

    def __call__(self, features_ND: Tensor) -> Tensor:
        """Whitened features (N, D) float64, the direction of most variance first."""
        return (features_ND.double() - self.mean) @ self.projection.T


def learn_whitening(features_ND: Tensor, *, corrected: bool) -> Whitening:
    """The whitening of these features, with the covariance around their mean where `corrected`.

    The original takes the mean from the features that it whitens, but computes the covariance around 0. Its largest
    direction is then that of the mean, which the subtraction has already emptied.
    """
    features_ND = features_ND.double()
    mean_D = features_ND.mean(dim=0)
    around_ND = features_ND - mean_D if corrected else features_ND
    values_D, vectors_DD = torch.linalg.eigh(around_ND.T @ around_ND / len(around_ND))
    values_D = values_D.clamp(min=float(values_D.max()) * FLOOR)
    return Whitening(mean_D, (vectors_DD / values_D.sqrt()).flip(1).T)
