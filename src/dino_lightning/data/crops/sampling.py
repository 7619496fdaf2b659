"""Random parameters of the multi-crop augmentation: the one place where they are drawn, whatever applies them.

A crop is: cut and resize (bicubic), flip, color jitter, grayscale, blur, solarise, normalize. `draw_crops` makes the
`Crop`s of one image from its size and a `Dice`. With `OriginalDice` the numbers come from the generators of PyTorch and
Python in the order in which the original's transforms consume them: after the same seeds, the same crops to the bit.
"""

import math
import random
from dataclasses import dataclass
from typing import Protocol

import torch

from dino_lightning.config import CropsConfig

GLOBAL_1, GLOBAL_2, LOCAL = 0, 1, 2
"""Positions of a kind of view in `crops.blur_p` and `crops.solarize_p`."""
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0, 1, 2, 3
"""The four parts of the color jitter, as numbered by torchvision."""
TRIES = 10
"""Boxes drawn before the fallback of `random_box`."""


@dataclass(frozen=True, slots=True)
class Crop:
    """What happens to one crop."""

    box: tuple[int, int, int, int]
    """Top, left, height and width in the image (pixels)."""
    size: int
    """Side after resizing (pixels)."""
    flip: bool
    jitter: tuple[tuple[int, float], ...]
    """Parts of the color jitter in their order, each with its factor (hue: turns); empty for none."""
    gray: bool
    blur: float
    """Standard deviation of the blur (pixels); 0 for none."""
    solarize: bool


class CropRNG(Protocol):
    """Random numbers from two streams, as the original has them: PyTorch's and Python's."""

    def uniform(self, low: float, high: float, /) -> float:
        """PyTorch's, from `low` to `high`."""
        ...

    def log_uniform(self, low: float, high: float, /) -> float:
        """PyTorch's, from `low` to `high`, uniform in the logarithm."""
        ...

    def integer(self, below: int, /) -> int:
        """PyTorch's, from 0 to `below` - 1."""
        ...

    def order(self) -> list[int]:
        """A permutation of 0 to 3 from PyTorch's stream."""
        ...

    def chance(self) -> float:
        """PyTorch's, from 0 to 1."""
        ...

    def python_chance(self) -> float:
        """Python's, from 0 to 1."""
        ...

    def python_uniform(self, low: float, high: float, /) -> float:
        """Python's, from `low` to `high`."""
        ...


class ReferenceRNG:
    """The original's generators, of one seed and apart from the process's own."""

    def __init__(self, seed: int) -> None:
        self._torch = torch.Generator().manual_seed(seed)
        self._python = random.Random(seed)

    def uniform(self, low: float, high: float) -> float:
        """A float32, as `Tensor.uniform_` draws it."""
        return torch.empty(1).uniform_(low, high, generator=self._torch).item()

    def log_uniform(self, low: float, high: float) -> float:
        """In float32, as torchvision draws aspect ratios."""
        logarithms = torch.log(torch.tensor([low, high])).tolist()
        return torch.exp(torch.empty(1).uniform_(*logarithms, generator=self._torch)).item()

    def integer(self, below: int) -> int:
        """As `torch.randint`."""
        return int(torch.randint(below, (1,), generator=self._torch).item())

    def order(self) -> list[int]:
        """As `torch.randperm`."""
        return torch.randperm(4, generator=self._torch).tolist()

    def chance(self) -> float:
        """As `torch.rand`."""
        return torch.rand(1, generator=self._torch).item()

    def python_chance(self) -> float:
        """As `random.random`."""
        return self._python.random()

    def python_uniform(self, low: float, high: float) -> float:
        """As `random.uniform`."""
        return self._python.uniform(low, high)


class FastRNG:
    """Python's generator alone, several times as fast as scalars of PyTorch: the same distributions, other numbers."""

    def __init__(self, seed: int) -> None:
        generator = random.Random(seed)
        self.uniform = self.python_uniform = generator.uniform
        self.chance = self.python_chance = generator.random
        self._generator = generator

    def log_uniform(self, low: float, high: float) -> float:
        """From `low` to `high`, uniform in the logarithm."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def integer(self, below: int) -> int:
        """From 0 to `below` - 1."""
        return int(self._generator.random() * below)

    def order(self) -> list[int]:
        """A permutation of 0 to 3."""
        order = [0, 1, 2, 3]
        self._generator.shuffle(order)
        return order


def draw_crops(config: CropsConfig, *, width: int, height: int, dice: CropRNG) -> list[Crop]:
    """The V crops of an image of this size: two global ones, then `local_count` local ones."""
    views = [GLOBAL_1, GLOBAL_2] + [LOCAL] * config.local_count
    return [draw_crop(config, view, width=width, height=height, dice=dice) for view in views]


def draw_crop(config: CropsConfig, view: int, *, width: int, height: int, dice: CropRNG) -> Crop:
    """One crop: `GLOBAL_1`, `GLOBAL_2` or `LOCAL`. The arguments below are evaluated, and draw, in their order."""
    local = view == LOCAL
    scale = config.local_scale if local else config.global_scale
    return Crop(
        box=random_box(width, height, scale=scale, ratio=config.ratio, dice=dice),
        size=config.local_size if local else config.global_size,
        flip=dice.chance() < config.flip_p,
        # torchvision's RandomApply compares the other way round than its flip.
        jitter=() if config.jitter_p < dice.chance() else draw_jitter(config, dice=dice),
        gray=dice.chance() < config.grayscale_p,
        blur=0.0 if dice.python_chance() > config.blur_p[view] else dice.python_uniform(*config.blur_radius),
        # A view without solarisation draws nothing, as in the original, which has no such operator there.
        solarize=bool(config.solarize_p[view]) and dice.python_chance() < config.solarize_p[view],
    )


def random_box(
    width: int, height: int, *, scale: list[float], ratio: list[float], dice: CropRNG
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a box with an area and an aspect ratio drawn from their ranges.

    The ratio is uniform in its logarithm. A box that does not fit is drawn again; after ten of them it is the largest
    central one within the ratios.
    """
    area, (narrowest, widest) = width * height, ratio
    for _ in range(TRIES):
        target, shape = area * dice.uniform(*scale), dice.log_uniform(narrowest, widest)
        w, h = round(math.sqrt(target * shape)), round(math.sqrt(target / shape))
        if 0 < w <= width and 0 < h <= height:
            return dice.integer(height - h + 1), dice.integer(width - w + 1), h, w
    w, h = width, height
    if width / height < narrowest:
        h = max(1, round(w / narrowest))
    elif width / height > widest:
        w = max(1, round(h * widest))
    return (height - h) // 2, (width - w) // 2, h, w


def draw_jitter(config: CropsConfig, *, dice: CropRNG) -> tuple[tuple[int, float], ...]:
    """Brightness, contrast, saturation and hue in random order; a part of strength 0 is left out."""
    order = dice.order()
    strengths = ((BRIGHTNESS, config.brightness), (CONTRAST, config.contrast), (SATURATION, config.saturation))
    factors = {part: dice.uniform(max(0.0, 1 - by), 1 + by) for part, by in strengths if by}
    if config.hue:
        factors[HUE] = dice.uniform(-config.hue, config.hue)
    return tuple((part, factors[part]) for part in order if part in factors)
