"""`crops=pil`: the operators of the original DINO, computed by PIL and torchvision."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, ToTensor
from torchvision.transforms.v2 import functional

from dino_lightning.config import CropsConfig
from dino_lightning.data.crops.sampling import Crop, ReferenceRNG, sample_crops

F: Any = functional  # its annotations do not include PIL images

JITTER: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    F.adjust_brightness,
    F.adjust_contrast,
    F.adjust_saturation,
    F.adjust_hue,
)
"""The operations of the color jitter, by their number in `sampling`."""


class PILCrops:
    """Image and seed -> list of crops (C, size, size), normalized: two global ones, then `local_count` local ones."""

    def __init__(self, config: CropsConfig) -> None:
        self.config, self.finish = config, Normalized(config)

    def __call__(self, image: Image.Image, *, seed: int) -> list[Tensor]:
        """The crops of the original after `torch.manual_seed(seed)` and `random.seed(seed)`."""
        crops = sample_crops(self.config, width=image.width, height=image.height, rng=ReferenceRNG(seed))
        return [self.finish(apply(crop, image, threshold=self.config.solarize_threshold)) for crop in crops]


class Normalized:
    """PIL image, or tensor (C, H, W) uint8 -> float32 (C, H, W), normalized by mean and standard deviation."""

    def __init__(self, config: CropsConfig) -> None:
        self.mean, self.std = config.mean, config.std
        # v2.ToDtype(scale=True) multiplies by 1/255, but ToTensor divides by 255: half of the values differ in one bit.
        self.to_tensor = ToTensor()

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """The normalized values."""
        values = image / 255 if isinstance(image, Tensor) else self.to_tensor(image)
        return F.normalize(values, self.mean, self.std)


def apply(crop: Crop, image: Image.Image, *, threshold: int) -> Image.Image:
    """One crop of an image, before normalization."""
    top, left, height, width = crop.box
    image = F.resized_crop(image, top, left, height, width, [crop.size] * 2, InterpolationMode.BICUBIC)
    if crop.flip:
        image = F.horizontal_flip(image)
    for operation, factor in crop.jitter:
        image = JITTER[operation](image, factor)
    if crop.gray:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if crop.blur:
        # torchvision's GaussianBlur is a different operator, with a truncated kernel.
        image = image.filter(ImageFilter.GaussianBlur(crop.blur))
    return ImageOps.solarize(image, threshold) if crop.solarize else image


class EvalView:
    """The transform for evaluation: PIL image or tensor -> tensor (C, eval_size, eval_size), normalized.

    The image is resized by its shorter side (bicubic) and center-cropped.
    """

    def __init__(self, config: CropsConfig) -> None:
        self.config, self.finish = config, Normalized(config)

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """The normalized image."""
        resized = F.resize(image, [self.config.eval_resize], InterpolationMode.BICUBIC)
        return self.finish(F.center_crop(resized, [self.config.eval_size]))


def denormalize(images: Tensor, *, config: CropsConfig) -> Tensor:
    """Undo the normalization of images (…, C, H, W): values from 0 to 1."""
    mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (config.mean, config.std))
    return (images * std + mean).clamp(0, 1)
