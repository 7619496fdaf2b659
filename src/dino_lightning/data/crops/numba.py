"""`crops=cpu`: the operators of one crop as compiled loops.

They compute the same as `photometric`, in float32 without rounding between operators. A crop stays in the processor's
cache from the first loop to the last, and each loop does in one pass what needs several in a tensor library. numba
compiles them at first use, in seconds, and stores the result on disk.

Arrays: x (C, S, S) float32 of values from 0 to 255.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from dino_lightning.config import CropsConfig
from dino_lightning.data.crops.blur import PASSES, box_weights
from dino_lightning.data.crops.photometric import BLUE, GREEN, RED
from dino_lightning.data.crops.sampling import BRIGHTNESS, CONTRAST, SATURATION, Crop

Floats = NDArray[np.float32]
WHITE = np.float32(255)
F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile the function to machine code."""
    options: dict[str, Any] = {"fastmath": True, "nogil": True, "error_model": "numpy"}
    try:
        return cast(F, njit(cache=True, **options)(function))
    except RuntimeError:  # there is no writable folder for the result, so every run compiles it
        return cast(F, njit(**options)(function))


class Finisher:
    """Raw crop uint8 (C, S, S) and its parameters -> augmented and normalized float32.

    The constructor compiles loops that are not cached, so that loader processes start with compiled ones.
    """

    def __init__(self, config: CropsConfig) -> None:
        self.mean = np.array(config.mean, np.float32) * WHITE
        self.scale: Floats = np.float32(1) / (np.array(config.std, np.float32) * WHITE)
        self.threshold = config.solarize_threshold - 0.5  # as if values were rounded first
        identity = Crop(box=(0, 0, 8, 8), size=8, flip=False, jitter=(), gray=False, blur=0.0, solarize=False)
        channels = len(config.mean)
        self(torch.zeros(channels, 8, 8, dtype=torch.uint8), identity, out=torch.empty(channels, 8, 8))

    def __call__(self, image_CSS: Tensor, crop: Crop, *, out: Tensor) -> None:
        """Write the augmented crop to the contiguous `out` (C, S, S). Fastest with channels last in memory."""
        _finish(
            np.ascontiguousarray(image_CSS.permute(1, 2, 0).numpy()),
            crop.flip,
            np.array([operation for operation, _ in crop.jitter], np.int64),
            np.array([factor for _, factor in crop.jitter], np.float32),
            crop.gray,
            np.array(box_weights(crop.blur) if crop.blur else [1], np.float32),
            np.float32(self.threshold if crop.solarize else np.inf),
            self.mean,
            self.scale,
            out.numpy(),
        )


@compiled
def _finish(
    raw_crop: NDArray[np.uint8],
    flip: bool,
    operations: NDArray[np.int64],
    factors: Floats,
    gray: bool,
    box: Floats,
    threshold: np.float32,
    mean: Floats,
    scale: Floats,
    x: Floats,
) -> None:
    """Apply all operators in their order; `x` is work space and result."""
    _load(raw_crop, flip, x)
    for i in range(len(operations)):
        if operations[i] == BRIGHTNESS:
            _blend(x, factors[i], np.float32(0))
        elif operations[i] == CONTRAST:
            _blend(x, factors[i], (1 - factors[i]) * _mean_luminance(x))
        elif operations[i] == SATURATION:
            _saturate(x, factors[i])
        else:
            _turn_hue(x, factors[i])
    if gray:
        _gray(x)
    if len(box) > 1:
        _blur_rows(x, box)
        _blur_columns(x, box)
    for c in range(x.shape[0]):
        plane = x[c].reshape(-1)
        for p in range(len(plane)):
            value = WHITE - plane[p] if plane[p] >= threshold else plane[p]
            plane[p] = (value - mean[c]) * scale[c]


@compiled
def _load(raw_crop: NDArray[np.uint8], flip: bool, x: Floats) -> None:
    size = raw_crop.shape[1]
    for c in range(raw_crop.shape[2]):
        for i in range(raw_crop.shape[0]):
            line = x[c, i, ::-1] if flip else x[c, i]
            for j in range(size):
                line[j] = raw_crop[i, j, c]


@compiled
def _blend(x: Floats, keep: np.float32, added: np.float32) -> None:
    flat = x.reshape(-1)
    for p in range(len(flat)):
        flat[p] = min(max(flat[p] * keep + added, np.float32(0)), WHITE)


@compiled
def _luminance(red: np.float32, green: np.float32, blue: np.float32) -> np.float32:
    """ITU-R 601, like PIL."""
    return np.float32(0.299) * red + np.float32(0.587) * green + np.float32(0.114) * blue


@compiled
def _mean_luminance(x: Floats) -> np.float32:
    """Rounded to an integer, like in PIL; unless there are three channels, the mean of all."""
    C = x.shape[0]
    means = np.empty(C, np.float32)
    for c in range(C):
        means[c] = x[c].mean()
    mean = _luminance(means[0], means[1], means[2]) if C == 3 else means.mean()
    return np.float32(np.rint(mean))


@compiled
def _saturate(x: Floats, keep: np.float32) -> None:
    red, green, blue = x[0].reshape(-1), x[1].reshape(-1), x[2].reshape(-1)
    for p in range(len(red)):
        added = (1 - keep) * _luminance(red[p], green[p], blue[p])
        red[p] = min(max(red[p] * keep + added, np.float32(0)), WHITE)
        green[p] = min(max(green[p] * keep + added, np.float32(0)), WHITE)
        blue[p] = min(max(blue[p] * keep + added, np.float32(0)), WHITE)


@compiled
def _turn_hue(x: Floats, turn: np.float32) -> None:
    """Rotate the hue by a share of the full circle, with the formula of `photometric.turn_hue`."""
    red, green, blue = x[0].reshape(-1), x[1].reshape(-1), x[2].reshape(-1)
    at_red, at_green, at_blue = _turned_position(RED, turn), _turned_position(GREEN, turn), _turned_position(BLUE, turn)
    for p in range(len(red)):
        r, g, b = red[p], green[p], blue[p]
        upper, lower = max(g, b), min(g, b)
        largest, middle = max(r, upper), min(r, upper)
        smallest = min(middle, lower)
        c = largest - smallest
        s, t = np.float32(1 if g >= b else -1), np.float32(1 if r >= upper else -1)
        h = abs(t * (3 * s - 2) - 1 + (middle - lower) / max(c, np.float32(1e-6)))
        base = smallest + 2 * c
        red[p] = base - c * _wheel(h - at_red)
        green[p] = base - c * _wheel(h - at_green)
        blue[p] = base - c * _wheel(h - at_blue)


@compiled
def _turned_position(position: float, turn: np.float32) -> np.float32:
    return np.float32((position - 6 * turn) % 6)


@compiled
def _wheel(distance: np.float32) -> np.float32:
    return min(max(abs(abs(distance) - np.float32(3)), np.float32(1)), np.float32(2))


@compiled
def _gray(x: Floats) -> None:
    red, green, blue = x[0].reshape(-1), x[1].reshape(-1), x[2].reshape(-1)
    for p in range(len(red)):
        red[p] = green[p] = blue[p] = _luminance(red[p], green[p], blue[p])


@compiled
def _blur_rows(x: Floats, box: Floats) -> None:
    """Apply three boxes along each row, which is extended by its edge pixels."""
    reach, size = len(box) - 1, x.shape[2]
    row = np.empty(size + 2 * reach, np.float32)
    # Slices instead of sums of indices, because numba would test in every iteration whether those are negative.
    middle, left, right = row[reach : reach + size], row[reach - 1 :], row[reach + 1 :]
    for c in range(x.shape[0]):
        for i in range(x.shape[1]):
            line = x[c, i]
            for _ in range(PASSES):
                for j in range(size):
                    middle[j] = line[j]
                for d in range(reach):
                    row[d], row[reach + size + d] = line[0], line[size - 1]
                for j in range(size):
                    line[j] = box[0] * middle[j] + box[1] * (left[j] + right[j])
                for d in range(2, reach + 1):
                    farther_left, farther_right = row[reach - d :], row[reach + d :]
                    for j in range(size):
                        line[j] += box[d] * (farther_left[j] + farther_right[j])


@compiled
def _blur_columns(x: Floats, box: Floats) -> None:
    """Apply three boxes along each column, by whole rows of pixels."""
    reach, rows = len(box) - 1, x.shape[1]
    before = np.empty_like(x[0])
    for c in range(x.shape[0]):
        for _ in range(PASSES):
            before[:] = x[c]
            for i in range(rows):
                line, middle = x[c, i], before[i]
                above, below = before[max(i - 1, 0)], before[min(i + 1, rows - 1)]
                for j in range(len(line)):
                    line[j] = box[0] * middle[j] + box[1] * (above[j] + below[j])
                for d in range(2, reach + 1):
                    above, below = before[max(i - d, 0)], before[min(i + d, rows - 1)]
                    for j in range(len(line)):
                        line[j] += box[d] * (above[j] + below[j])
