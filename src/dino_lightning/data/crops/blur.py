"""PIL's Gaussian blur: three extended box blurs along each axis.

A box of radius l + a averages 2 l + 1 pixels and a share of the next pixel on each side; l and a are chosen so that
three boxes have the variance of the Gaussian (Gwosdek et al., "Theoretical foundations of Gaussian convolution by
extended box filtering", equations 8 and 14). Each box extends the image by its edge pixels, so the three boxes are a
single kernel only in the interior, and pixels near an edge have different weights.

Here each axis is a product with a matrix that contains the three boxes with their edges: two batched matrix products,
which are fast on an accelerator. `numba` applies the boxes one after the other.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

PASSES = 3


def box_weights(sigma: float) -> list[float]:
    """Weights of a box at distance 0, 1, … (pixels); they sum to 1 over both sides."""
    variance = sigma**2 / PASSES
    l = int((math.sqrt(12 * variance + 1) - 1) / 2)  # noqa: E741 - the symbol of the paper
    a = (2 * l + 1) * (l * (l + 1) - 3 * variance) / (6 * (variance - (l + 1) ** 2))
    inner = 1 / (2 * (l + a) + 1)
    return [inner] * (l + 1) + [a * inner]


def padded_weights(sigmas: Sequence[float]) -> list[list[float]]:
    """The `box_weights` of each standard deviation, padded with zeros."""
    rows = [box_weights(sigma) for sigma in sigmas]
    longest = max(map(len, rows), default=0)
    return [row + [0.0] * (longest - len(row)) for row in rows]


def blur(images_NCHW: Tensor, weights_NR: Tensor) -> Tensor:
    """Blur N images, each with its own `padded_weights`."""
    H, W = images_NCHW.shape[-2:]
    rows_N1HH, columns_N1WW = (box_matrices(weights_NR, size=size)[:, None] for size in (H, W))
    return rows_N1HH @ images_NCHW @ columns_N1WW.mT


def box_matrices(weights_NR: Tensor, *, size: int) -> Tensor:
    """Matrices (N, size, size) of three boxes along an axis: row i contains the weights of output pixel i."""
    table = shifts(size, weights_NR.shape[1], weights_NR.device)
    matrices = torch.einsum("nr,rij->nij", weights_NR, table)
    return torch.linalg.matrix_power(matrices, PASSES)


@lru_cache(maxsize=16)
def shifts(size: int, distances: int, device: torch.device) -> Tensor:
    """For each distance, the matrix (size, size) that sums the two pixels at it, with extended edges."""
    positions = torch.arange(size, device=device)
    table = torch.zeros(distances, size, size, device=device)
    table[0] = torch.eye(size, device=device)
    for distance in range(1, distances):
        for side in (-distance, distance):
            table[distance, positions, (positions + side).clamp(0, size - 1)] += 1
    return table
