"""Flip, color jitter, grayscale, blur, solarisation and normalization of a whole batch of crops at once.

They compute what PIL computes, in float32 and without cutting to whole numbers between the steps. Every crop has its
own parameters; how many crops an operator touches is known beforehand, so that nothing waits for the accelerator.
Shapes: N crops in the order of their plan, C channels, S side; values from 0 to 255.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from dino_lightning.config import CropsConfig
from dino_lightning.data.crops.blur import blur
from dino_lightning.data.crops.device_plan import BLENDS, Plan

LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a gray picture (ITU-R 601, as in PIL)."""
WHITE = 255.0
TINY = 1e-6
"""Kept from zero, where a gray pixel has no hue."""
RED, GREEN, BLUE = 3.0, 5.0, 1.0
"""The hue opposite to red, and those that are as far from green and blue (sixths of a circle)."""


def augment(images_NCSS: Tensor, plan: Plan, config: CropsConfig) -> Tensor:
    """Crops uint8 in the order of the plan -> augmented, normalized float32 in the order of the batch.

    Overwrites the crops.
    """
    change(images_NCSS, plan.indices["flip"], lambda some: some.flip(-1))
    x = images_NCSS.to(torch.float32, memory_format=torch.contiguous_format)
    jitter(x, plan)
    change(x, plan.indices["gray"], lambda some: luminance(some).expand_as(some))
    blurred = plan.indices["blur"]
    if len(blurred):
        weights_NR = plan.numbers["blur"].view(len(blurred), -1)
        change(x, blurred, lambda some: blur(some, weights_NR))
    change(x, plan.indices["solarize"], lambda some: solarize(some, threshold=config.solarize_threshold))
    mean, std = (constant(tuple(values), x.device).view(-1, 1, 1) * WHITE for values in (config.mean, config.std))
    return x.sub_(mean).div_(std).index_select(0, plan.indices["inverse"])


def change(x: Tensor, indices: Tensor, operator: Callable[[Tensor], Tensor]) -> None:
    """Apply an operator to some images, in place."""
    if len(indices):
        x.index_copy_(0, indices, operator(x.index_select(0, indices)))


def jitter(x: Tensor, plan: Plan) -> None:
    """Brightness, contrast, saturation and hue, in the order that each crop has drawn; in place.

    for k in 0, 1, 2, 3:
        the hue of the crops of slice k turns
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
            stays = column(plan.numbers[f"saturation_{k}"])
            change(x, plan.indices[f"saturation_{k}"], lambda some, stays=stays: saturate_(some, stays))


@lru_cache(maxsize=16)
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers that stay on the device: to send them there would wait for its queue."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def column(values_N: Tensor) -> Tensor:
    """One number per image, against (N, C, S, S)."""
    return values_N.view(-1, 1, 1, 1)


def luminance(x: Tensor) -> Tensor:
    """Gray pictures (N, 1, S, S) of color ones (N, 3, S, S)."""
    red, green, blue = LUMINANCE
    return (x[:, 0:1] * red).add_(x[:, 1:2], alpha=green).add_(x[:, 2:3], alpha=blue)


def mean_luminance(x: Tensor) -> Tensor:
    """Of each image (N,), a whole number as in PIL; with other than three channels, their mean."""
    means_NC = x.mean((2, 3))
    weights = LUMINANCE if x.shape[1] == 3 else (1 / x.shape[1],) * x.shape[1]
    return (means_NC @ constant(weights, x.device)).round_()


def saturate_(x: Tensor, stays: Tensor | float) -> Tensor:
    """Blend with the gray picture, in place; `stays` is a share for all crops, or one for each (N, 1, 1, 1)."""
    gray = luminance(x).mul_(1 - stays)
    return x.mul_(stays).add_(gray).clamp_(0, WHITE)


def solarize(x: Tensor, *, threshold: int) -> Tensor:
    """Invert the values at or above the threshold: 127.5 ± (x - 127.5)."""
    # Half a step below the threshold, so that the sign is never 0 for whole numbers.
    side = x.sub(threshold - 0.5).sign_().neg_()
    return x.sub(WHITE / 2).mul_(side).add_(WHITE / 2)


def turn_hue(x: Tensor, turns: Tensor | float) -> None:
    """Turn the hue of color images (N, 3, S, S) by a share of the full circle, value and saturation kept; in place.

    `turns` is one number for all crops, or one for each (N, 1, 1).
    With u and l the larger and the smaller of green and blue, m the smaller of red and u, c the largest minus the
    smallest channel, and the signs s of (green - blue) and t of (red - u), the hue in sixths of a circle is
        h = | t (3 s - 2) - 1 + (m - l) / c |
    and a channel at the position b (`RED`, `GREEN`, `BLUE`), turned the other way and taken from 0 to 6, becomes
        smallest + 2c - c clamp(| | h - b | - 3 |, 1, 2).
    """
    red, green, blue = x.unbind(1)
    upper, lower = torch.maximum(green, blue), torch.minimum(green, blue)
    largest, middle = torch.maximum(red, upper), torch.minimum(red, upper)
    # TINY stands for the sign of 0.
    s, t = (difference.add_(TINY).sign_() for difference in (green - blue, torch.sub(red, upper, out=upper)))
    k = s.mul_(3).sub_(2).mul_(t).sub_(1)
    smallest = torch.minimum(middle, lower, out=t)
    c = largest.sub_(smallest)
    hue = middle.sub_(lower).div_(torch.clamp(c, min=TINY, out=lower)).add_(k).abs_()
    base = smallest.add_(c, alpha=2)
    for channel, position in ((red, RED), (green, GREEN), (blue, BLUE)):
        torch.sub(hue, (position - 6 * turns) % 6, out=channel).abs_().sub_(3).abs_().clamp_(1, 2)
        torch.addcmul(base, channel, c, value=-1, out=channel)
