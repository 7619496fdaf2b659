"""KoLeo, a regularizer that spreads features over the sphere."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_lightning.runtime.precision import at_least_float32, without_autocast


def koleo(features_BD: Tensor) -> Tensor:
    """The Kozachenko-Leonenko estimate of (negative) entropy: -mean log distance to the nearest other feature.

    Features are normalized, so that they spread over the sphere (Sablayrolles et al. 2019, DINOv2). The search for the
    nearest feature takes no gradient.
    """
    x_BD = F.normalize(at_least_float32(features_BD), dim=-1, eps=1e-8)
    with torch.no_grad(), without_autocast(x_BD):
        similarity_BB = x_BD @ x_BD.T
        nearest_B = similarity_BB.fill_diagonal_(-2.0).argmax(dim=1)
    distance_B = (x_BD - x_BD[nearest_B] + 1e-8).norm(dim=-1)
    return -(distance_B + 1e-8).log().mean()
