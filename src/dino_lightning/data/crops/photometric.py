"""Flip, color jitter, grayscale, blur, solarization and normalization of a batch of crops on the device.

The operators compute the same as PIL, in float32 without rounding between them. Every crop has its own parameters; the
number of crops that an operator changes is known in advance, so that nothing synchronizes with the accelerator.
Shapes: N crops in the order of their plan, C channels, S side; values from 0 to 255.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from dino_lightning.config import CropsConfig
from dino_lightning.data.crops.blur import blur
from dino_lightning.data.crops.device_plan import BLENDS, DevicePlan

LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a gray image (ITU-R 601, like PIL)."""
WHITE = 255.0
TINY = 1e-6
"""Avoids divisions by zero for gray pixels, which have no hue."""
RED, GREEN, BLUE = 3.0, 5.0, 1.0
"""The hue opposite to red, and those at the same distance from green and blue (sixths of a circle)."""


def augment(images_NCSS: Tensor, plan: DevicePlan, config: CropsConfig) -> Tensor:
    """Crops uint8 in the order of the plan -> augmented, normalized float32 in the order of the batch.

    Overwrites the crops.
    """
    change(images_NCSS, plan.indices["flip"], lambda images: images.flip(-1))
    x = images_NCSS.to(torch.float32, memory_format=torch.contiguous_format)
    jitter(x, plan)
    change(x, plan.indices["gray"], lambda images: luminance(images).expand_as(images))
    blurred = plan.indices["blur"]
    if len(blurred):
        weights_NR = plan.numbers["blur"].view(len(blurred), -1)
        change(x, blurred, lambda images: blur(images, weights_NR))
    change(x, plan.indices["solarize"], lambda images: solarize(images, threshold=config.solarize_threshold))
    mean, std = (constant(tuple(values), x.device).view(-1, 1, 1) * WHITE for values in (config.mean, config.std))
    return x.sub_(mean).div_(std).index_select(0, plan.indices["inverse"])


def change(x: Tensor, indices: Tensor, operator: Callable[[Tensor], Tensor]) -> None:
    """Apply an operator to some images, in place."""
    if len(indices):
        x.index_copy_(0, indices, operator(x.index_select(0, indices)))


def jitter(x: Tensor, plan: DevicePlan) -> None:
    """Brightness, contrast, saturation and hue, in the random order of each crop; in place.

    for k in 0, 1, 2, 3:
        the hue of the crops in slice k changes
        blend k of all crops:  x <- keep x + (1 - keep) (black | mean luminance | luminance of the pixel)
    """
    first = plan.hue_bounds[0]
    colored = x[first:]
    if not len(colored):
        return
    keep, mean = (plan.numbers[name].view(BLENDS, -1) for name in ("keep", "mean"))
    turns = plan.numbers["hue"]
    for k in range(BLENDS + 1):
        start, end = plan.hue_bounds[k : k + 2]
        if len(turns) and end > start:
            turn_hue(x[start:end], turns[start - first : end - first, None, None])
        if k < BLENDS:
            added = mean[k] * mean_luminance(colored)
            colored.mul_(column(keep[k])).add_(column(added)).clamp_(0, WHITE)
            share = column(plan.numbers[f"saturation_{k}"])
            change(x, plan.indices[f"saturation_{k}"], lambda images, share=share: saturate_(images, share))


@lru_cache(maxsize=16)
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A constant on the device, cached because copying it would synchronize with the device."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def column(values_N: Tensor) -> Tensor:
    """One number per image, broadcast to (N, C, S, S)."""
    return values_N.view(-1, 1, 1, 1)


def luminance(x: Tensor) -> Tensor:
    """Gray images (N, 1, S, S) of color images (N, 3, S, S)."""
    red, green, blue = LUMINANCE
    return (x[:, 0:1] * red).add_(x[:, 1:2], alpha=green).add_(x[:, 2:3], alpha=blue)


def mean_luminance(x: Tensor) -> Tensor:
    """Mean of each image (N,), rounded like in PIL; unless there are three channels, the mean of all."""
    means_NC = x.mean((2, 3))
    weights = LUMINANCE if x.shape[1] == 3 else (1 / x.shape[1],) * x.shape[1]
    return (means_NC @ constant(weights, x.device)).round_()


def saturate_(x: Tensor, share: Tensor | float) -> Tensor:
    """Blend a share of the image, one for all or one for each (N, 1, 1, 1), with its gray version, in place."""
    gray = luminance(x).mul_(1 - share)
    return x.mul_(share).add_(gray).clamp_(0, WHITE)


def solarize(x: Tensor, *, threshold: int) -> Tensor:
    """Invert the values at or above the threshold: 127.5 ± (x - 127.5)."""
    # Half below the threshold, so that the sign is never 0 for integers.
    side = x.sub(threshold - 0.5).sign_().neg_()
    return x.sub(WHITE / 2).mul_(side).add_(WHITE / 2)


def turn_hue(x: Tensor, turns: Tensor | float) -> None:
    """Rotate the hue of color images (N, 3, S, S) by a share of the full circle, with constant value and saturation.

    In place. `turns` is one number for all crops, or one for each (N, 1, 1).
    With u and l the larger and the smaller of green and blue, m the smaller of red and u, c the largest minus the
    smallest channel, and the signs s of (green - blue) and t of (red - u), the hue in sixths of a circle is
        h = | t (3 s - 2) - 1 + (m - l) / c |
    and a channel at the position b (`RED`, `GREEN`, `BLUE`), rotated in the other direction modulo 6, becomes
        smallest + 2c - c clamp(| | h - b | - 3 |, 1, 2).
    """
    red, green, blue = x.unbind(1)
    upper, lower = torch.maximum(green, blue), torch.minimum(green, blue)
    largest, middle = torch.maximum(red, upper), torch.minimum(red, upper)
    # TINY makes the sign of 0 positive.
    s, t = (difference.add_(TINY).sign_() for difference in (green - blue, torch.sub(red, upper, out=upper)))
    k = s.mul_(3).sub_(2).mul_(t).sub_(1)
    smallest = torch.minimum(middle, lower, out=t)
    c = largest.sub_(smallest)
    hue = middle.sub_(lower).div_(torch.clamp(c, min=TINY, out=lower)).add_(k).abs_()
    base = smallest.add_(c, alpha=2)
    for channel, position in ((red, RED), (green, GREEN), (blue, BLUE)):
        torch.sub(hue, (position - 6 * turns) % 6, out=channel).abs_().sub_(3).abs_().clamp_(1, 2)
        torch.addcmul(base, channel, c, value=-1, out=channel)
