"""Slow reference implementation of bicubic interpolation with antialiasing, in Python loops."""

import math

import torch
from torch import Tensor


def cubic(x: float) -> float:
    """Keys' cubic kernel with a = -1/2."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def resized(line: list[float], size: int) -> list[float]:
    """A line of pixels resized to `size`; when it gets shorter, the kernel is wider by the same factor."""
    step = len(line) / size
    reach = 2 * max(1.0, step)
    out = []
    for i in range(size):
        middle = (i + 0.5) * step
        first, last = max(0, int(middle - reach + 0.5)), min(len(line), int(middle + reach + 0.5))
        weights = [cubic((j + 0.5 - middle) / max(1.0, step)) for j in range(first, last)]
        total = sum(weights)
        value = sum(w * v for w, v in zip(weights, line[first:last], strict=True)) / total
        out.append(min(255.0, max(0.0, math.floor(value + 0.5))))  # PIL rounds after each axis
    return out


def transposed(plane: list[list[float]]) -> list[list[float]]:
    return [list(line) for line in zip(*plane, strict=True)]


def resized_plane(plane: list[list[float]], width: int, height: int, *, rows_first: bool = True) -> list[list[float]]:
    """Resize both axes, one after the other. Intermediate values are clipped to 0 to 255, so the order matters."""
    if not rows_first:
        return transposed(resized_plane(transposed(plane), height, width))
    rows = [resized(row, width) for row in plane]
    return transposed([resized(column, height) for column in transposed(rows)])


def interpolated(image_CHW: Tensor, width: int, height: int, *, rows_first: bool = True) -> Tensor:
    """An image (C, H, W) of integers, resized."""
    planes = [resized_plane(plane, width, height, rows_first=rows_first) for plane in image_CHW.tolist()]
    return torch.tensor(planes)
