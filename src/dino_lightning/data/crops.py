"""The multi-crop augmentation with PIL: the original's operators in their order, with their probabilities.

A view is: crop and resize (bicubic), flip, colour jitter, grayscale, blur, solarise, normalise.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, ToTensor, v2

from dino_lightning.config import CropsConfig

GLOBAL_1, GLOBAL_2, LOCAL = 0, 1, 2
"""Positions of a kind of view in `crops.blur_p` and `crops.solarize_p`."""


class GaussianBlur:
    """PIL's blur, of a radius drawn from a range: three box blurs, without a kernel size.

    Not torchvision's `GaussianBlur`, whose truncated kernel is another operator.
    """

    def __init__(self, *, p: float, radius: list[float]) -> None:
        self.p, self.radius = p, radius

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur, or not."""
        if random.random() > self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.radius)))


class Solarize:
    """Invert the values at or above a threshold."""

    def __init__(self, *, p: float, threshold: int) -> None:
        self.p, self.threshold = p, threshold

    def __call__(self, image: Image.Image) -> Image.Image:
        """Solarise, or not."""
        # A view without solarisation draws nothing, as in the original, which has no such operator there.
        return ImageOps.solarize(image, self.threshold) if self.p and random.random() < self.p else image


class MultiCrop:
    """Image -> list of crops (3, size, size): two global ones, then `local_count` local ones."""

    def __init__(self, config: CropsConfig) -> None:
        self.views = [view_transform(config, GLOBAL_1), view_transform(config, GLOBAL_2)]
        self.local = view_transform(config, LOCAL)
        self.local_count = config.local_count

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """The crops of one image."""
        return [view(image) for view in self.views] + [self.local(image) for _ in range(self.local_count)]


def view_transform(config: CropsConfig, view: int) -> v2.Compose:
    """The transform of one kind of view: `GLOBAL_1`, `GLOBAL_2` or `LOCAL`."""
    size, scale = (
        (config.local_size, config.local_scale) if view == LOCAL else (config.global_size, config.global_scale)
    )
    (smallest, largest), (narrowest, widest) = scale, config.ratio
    crop = v2.RandomResizedCrop(
        size, scale=(smallest, largest), ratio=(narrowest, widest), interpolation=InterpolationMode.BICUBIC
    )
    jitter = v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
    return v2.Compose(
        [
            crop,
            v2.RandomHorizontalFlip(config.flip_p),
            v2.RandomApply([jitter], config.jitter_p),
            v2.RandomGrayscale(config.grayscale_p),
            GaussianBlur(p=config.blur_p[view], radius=config.blur_radius),
            Solarize(p=config.solarize_p[view], threshold=config.solarize_threshold),
            *_to_normalised(config),
        ]
    )


def eval_transform(config: CropsConfig) -> v2.Compose:
    """The transform for evaluation: resize the shorter side (bicubic), centre crop, normalise."""
    resize = v2.Resize(config.eval_resize, interpolation=InterpolationMode.BICUBIC)
    return v2.Compose([resize, v2.CenterCrop(config.eval_size), *_to_normalised(config)])


def denormalize(images: Tensor, *, config: CropsConfig) -> Tensor:
    """Undo the normalisation of images (…, 3, H, W): values in 0 to 1."""
    mean = torch.tensor(config.mean, device=images.device).view(-1, 1, 1)
    std = torch.tensor(config.std, device=images.device).view(-1, 1, 1)
    return (images * std + mean).clamp(0, 1)


def _to_normalised(config: CropsConfig) -> list[Callable[[Any], Any]]:
    # v2.ToDtype(scale=True) multiplies by 1/255 where ToTensor divides by 255: half of the values differ in a bit.
    return [ToTensor(), v2.Normalize(config.mean, config.std)]
