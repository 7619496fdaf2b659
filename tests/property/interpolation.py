"""Bicubic interpolation with antialiasing in plain Python, one pixel after the other."""

import math

import torch
from torch import Tensor


def cubic(x: float) -> float:
    """The kernel of Keys with a = -1/2."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def resized(line: list[float], size: int) -> list[float]:
    """A line of pixels at another length: the kernel is as much wider as the line is longer."""
    step = len(line) / size
    reach = 2 * max(1.0, step)
    out = []
    for i in range(size):
        middle = (i + 0.5) * step
        first, last = max(0, int(middle - reach + 0.5)), min(len(line), int(middle + reach + 0.5))
        weights = [cubic((j + 0.5 - middle) / max(1.0, step)) for j in range(first, last)]
        total = sum(weights)
        value = sum(w * v for w, v in zip(weights, line[first:last], strict=True)) / total
        out.append(min(255.0, max(0.0, math.floor(value + 0.5))))  # whole numbers after each axis, as in PIL
    return out


def transposed(plane: list[list[float]]) -> list[list[float]]:
    return [list(line) for line in zip(*plane, strict=True)]


def resized_plane(plane: list[list[float]], width: int, height: int, *, rows_first: bool = True) -> list[list[float]]:
    """Both axes, one after the other; what leaves 0 to 255 in between is cut off, so that the order shows."""
    if not rows_first:
        return transposed(resized_plane(transposed(plane), height, width))
    rows = [resized(row, width) for row in plane]
    return transposed([resized(column, height) for column in transposed(rows)])


def interpolated(image_CHW: Tensor, width: int, height: int, *, rows_first: bool = True) -> Tensor:
    """An image (C, H, W) of whole numbers at another size."""
    planes = [resized_plane(plane, width, height, rows_first=rows_first) for plane in image_CHW.tolist()]
    return torch.tensor(planes)
