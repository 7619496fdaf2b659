"""Samples all parameters of the multi-crop augmentation. The back ends only apply them.

The operators are: crop and resize (bicubic), flip, color jitter, grayscale, blur, solarize, normalize. `sample_crops`
samples the `Crop`s of one image from its size and a `CropRNG`. `ReferenceRNG` uses the generators of PyTorch and Python
in the order of the original DINO's transforms, so the same seeds give bit-identical crops.
"""

import math
import random
from dataclasses import dataclass
from typing import TypeAlias

import torch

from dino_lightning.config import CropsConfig

GLOBAL_1, GLOBAL_2, LOCAL = 0, 1, 2
"""Indices of the kinds of views in `crops.blur_p` and `crops.solarize_p`."""
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0, 1, 2, 3
"""The four operations of the color jitter, as numbered by torchvision."""
MAX_ATTEMPTS = 10
"""Boxes that are sampled before the fallback of `random_box`."""


@dataclass(frozen=True, slots=True)
class Crop:
    """The parameters of one crop."""

    box: tuple[int, int, int, int]
    """Top, left, height and width in the image (pixels)."""
    size: int
    """Side after resizing (pixels)."""
    flip: bool
    jitter: tuple[tuple[int, float], ...]
    """Operations of the color jitter in their order, each with its factor (hue: turns); empty without jitter."""
    gray: bool
    blur: float
    """Standard deviation of the blur (pixels); 0 without blur."""
    solarize: bool


class ReferenceRNG:
    """The original's two generators with one seed, separate from the global ones."""

    def __init__(self, seed: int) -> None:
        self._torch, self.python = torch.Generator().manual_seed(seed), random.Random(seed)

    def uniform(self, low: float, high: float) -> float:
        """A float32, like `Tensor.uniform_`."""
        return torch.empty(1).uniform_(low, high, generator=self._torch).item()

    def log_uniform(self, low: float, high: float) -> float:
        """In float32, like torchvision's aspect ratios."""
        logarithms = torch.log(torch.tensor([low, high])).tolist()
        return torch.exp(torch.empty(1).uniform_(*logarithms, generator=self._torch)).item()

    def integer(self, below: int) -> int:
        """Like `torch.randint`."""
        return int(torch.randint(below, (1,), generator=self._torch).item())

    def order(self) -> list[int]:
        """Like `torch.randperm`."""
        return torch.randperm(4, generator=self._torch).tolist()

    def chance(self) -> float:
        """Like `torch.rand`."""
        return torch.rand(1, generator=self._torch).item()


class FastRNG:
    """Only Python's generator, several times faster than PyTorch scalars: the same distributions, other numbers."""

    def __init__(self, seed: int) -> None:
        self.python = random.Random(seed)
        self.uniform, self.chance = self.python.uniform, self.python.random

    def log_uniform(self, low: float, high: float) -> float:
        """From `low` to `high`, uniform in the logarithm."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def integer(self, below: int) -> int:
        """From 0 to `below` - 1."""
        return int(self.python.random() * below)

    def order(self) -> list[int]:
        """A permutation of 0 to 3."""
        order = [0, 1, 2, 3]
        self.python.shuffle(order)
        return order


CropRNG: TypeAlias = ReferenceRNG | FastRNG


def sample_crops(config: CropsConfig, *, width: int, height: int, rng: CropRNG) -> list[Crop]:
    """The V crops of an image with this size: two global ones, then `local_count` local ones."""
    views = [GLOBAL_1, GLOBAL_2] + [LOCAL] * config.local_count
    return [sample_crop(config, view, width=width, height=height, rng=rng) for view in views]


def sample_crop(config: CropsConfig, view: int, *, width: int, height: int, rng: CropRNG) -> Crop:
    """The crop of a view `GLOBAL_1`, `GLOBAL_2` or `LOCAL`. Random numbers are drawn in the order of the arguments."""
    local = view == LOCAL
    scale = config.local_scale if local else config.global_scale
    return Crop(
        box=random_box(width, height, scale=scale, ratio=config.ratio, rng=rng),
        size=config.local_size if local else config.global_size,
        flip=rng.chance() < config.flip_p,
        # torchvision's RandomApply compares in the other direction than its flip.
        jitter=() if config.jitter_p < rng.chance() else sample_jitter(config, rng=rng),
        gray=rng.chance() < config.grayscale_p,
        blur=0.0 if rng.python.random() > config.blur_p[view] else rng.python.uniform(*config.blur_radius),
        # A view without solarization draws no number, because the original has no such operator there.
        solarize=bool(config.solarize_p[view]) and rng.python.random() < config.solarize_p[view],
    )


def random_box(
    width: int, height: int, *, scale: list[float], ratio: list[float], rng: CropRNG
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a box whose area and aspect ratio are sampled from their ranges.

    The ratio is uniform in its logarithm. A box that does not fit is sampled again, at most ten times; then it is the
    largest central box within the ratios.
    """
    area, (narrowest, widest) = width * height, ratio
    for _ in range(MAX_ATTEMPTS):
        target, shape = area * rng.uniform(*scale), rng.log_uniform(narrowest, widest)
        w, h = round(math.sqrt(target * shape)), round(math.sqrt(target / shape))
        if 0 < w <= width and 0 < h <= height:
            return rng.integer(height - h + 1), rng.integer(width - w + 1), h, w
    w, h = width, height
    if width / height < narrowest:
        h = max(1, round(w / narrowest))
    elif width / height > widest:
        w = max(1, round(h * widest))
    return (height - h) // 2, (width - w) // 2, h, w


def sample_jitter(config: CropsConfig, *, rng: CropRNG) -> tuple[tuple[int, float], ...]:
    """Brightness, contrast, saturation and hue in random order; an operation with strength 0 is omitted."""
    order = rng.order()
    strengths = ((BRIGHTNESS, config.brightness), (CONTRAST, config.contrast), (SATURATION, config.saturation))
    factors = {operation: rng.uniform(max(0.0, 1 - s), 1 + s) for operation, s in strengths if s}
    if config.hue:
        factors[HUE] = rng.uniform(-config.hue, config.hue)
    return tuple((operation, factors[operation]) for operation in order if operation in factors)
