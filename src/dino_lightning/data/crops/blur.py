"""PIL's Gaussian blur: three extended box blurs along each axis.

A box of radius l + a averages 2 l + 1 pixels and a share of the next one on either side; l and a are chosen so that
three boxes have the variance of the Gaussian (Gwosdek et al., "Theoretical foundations of Gaussian convolution by
extended box filtering", equations 8 and 14). Each box goes on with the edge pixel beyond the image, so that the three
are one kernel inside only, and the pixels near an edge have weights of their own.

Here each axis is one product with a matrix that holds the three boxes of an image with their edges: two batched matrix
products in all, which is what an accelerator does best. `compiled` runs the boxes one after the other.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

PASSES = 3


def box_weights(sigma: float) -> list[float]:
    """Weights of a box at distance 0, 1, … up to its reach (pixels); they sum to 1 over both sides."""
    variance = sigma**2 / PASSES
    whole = int((math.sqrt(12 * variance + 1) - 1) / 2)  # l, the radius of the box inside
    share = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    inner = 1 / (2 * (whole + share) + 1)
    return [inner] * (whole + 1) + [share * inner]


def padded_weights(sigmas: Sequence[float]) -> list[list[float]]:
    """The `box_weights` of each standard deviation, zeros behind them."""
    rows = [box_weights(sigma) for sigma in sigmas]
    longest = max(map(len, rows), default=0)
    return [row + [0.0] * (longest - len(row)) for row in rows]


def blur(images_NCHW: Tensor, weights_NR: Tensor) -> Tensor:
    """N images, each blurred by boxes with its own `padded_weights`."""
    H, W = images_NCHW.shape[-2:]
    rows_N1HH, columns_N1WW = (box_matrices(weights_NR, size=size)[:, None] for size in (H, W))
    return rows_N1HH @ images_NCHW @ columns_N1WW.mT


def box_matrices(weights_NR: Tensor, *, size: int) -> Tensor:
    """Matrices (N, size, size) of three boxes along an axis: row i holds the weights of output pixel i."""
    table = shifts(size, weights_NR.shape[1], weights_NR.device)
    matrices = torch.einsum("nr,rij->nij", weights_NR, table)
    return torch.linalg.matrix_power(matrices, PASSES)


@lru_cache(maxsize=16)
def shifts(size: int, distances: int, device: torch.device) -> Tensor:
    """For each distance the matrix (size, size) that sums the two pixels so far away, with the edges held."""
    at = torch.arange(size, device=device)
    table = torch.zeros(distances, size, size, device=device)
    table[0] = torch.eye(size, device=device)
    for distance in range(1, distances):
        for side in (-distance, distance):
            table[distance, at, (at + side).clamp(0, size - 1)] += 1
    return table
