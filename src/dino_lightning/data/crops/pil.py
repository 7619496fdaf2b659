"""`crops=pil`: the original's operators, as PIL and torchvision compute them."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, ToTensor
from torchvision.transforms.v2 import functional

from dino_lightning.config import CropsConfig
from dino_lightning.data.crops.sampling import Crop, ReferenceRNG, draw_crops

F: Any = functional  # its annotations know tensors only

JITTER: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    F.adjust_brightness,
    F.adjust_contrast,
    F.adjust_saturation,
    F.adjust_hue,
)
"""The parts of the color jitter by their number in `draws`."""


class PILCrops:
    """Image and seed -> list of crops (C, size, size), normalized: two global ones, then `local_count` local ones."""

    def __init__(self, config: CropsConfig) -> None:
        self.config = config
        self.finish = Normalized(config)

    def __call__(self, image: Image.Image, *, seed: int) -> list[Tensor]:
        """The crops that the original makes after `torch.manual_seed(seed)` and `random.seed(seed)`."""
        drawn = draw_crops(self.config, width=image.width, height=image.height, dice=ReferenceRNG(seed))
        return [self.finish(apply(crop, image, threshold=self.config.solarize_threshold)) for crop in drawn]


class Normalized:
    """PIL image, or tensor (C, H, W) uint8 -> float32 (C, H, W) with mean and standard deviation taken out."""

    def __init__(self, config: CropsConfig) -> None:
        self.mean, self.std = config.mean, config.std
        # v2.ToDtype(scale=True) multiplies by 1/255 where ToTensor divides by 255: half of the values differ in a bit.
        self.to_tensor = ToTensor()

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Values as the network takes them."""
        values = image / 255 if isinstance(image, Tensor) else self.to_tensor(image)
        return F.normalize(values, self.mean, self.std)


def apply(crop: Crop, image: Image.Image, *, threshold: int) -> Image.Image:
    """One crop of an image, before normalization."""
    top, left, height, width = crop.box
    image = F.resized_crop(image, top, left, height, width, [crop.size] * 2, InterpolationMode.BICUBIC)
    if crop.flip:
        image = F.horizontal_flip(image)
    for part, factor in crop.jitter:
        image = JITTER[part](image, factor)
    if crop.gray:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if crop.blur:
        # Not torchvision's GaussianBlur, whose truncated kernel is another operator.
        image = image.filter(ImageFilter.GaussianBlur(crop.blur))
    return ImageOps.solarize(image, threshold) if crop.solarize else image


T = TypeVar("T", bound=Image.Image | Tensor)


def eval_image(image: T, *, config: CropsConfig) -> T:
    """What evaluation sees of an image: the shorter side resized (bicubic), and the center."""
    resized = F.resize(image, [config.eval_resize], InterpolationMode.BICUBIC)
    return F.center_crop(resized, [config.eval_size])


class EvalView:
    """The transform for evaluation: PIL image or tensor -> tensor (C, eval_size, eval_size), normalized."""

    def __init__(self, config: CropsConfig) -> None:
        self.config, self.finish = config, Normalized(config)

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Values as the network takes them."""
        return self.finish(eval_image(image, config=self.config))


def denormalize(images: Tensor, *, config: CropsConfig) -> Tensor:
    """Undo the normalization of images (…, C, H, W): values in 0 to 1."""
    mean = torch.tensor(config.mean, device=images.device).view(-1, 1, 1)
    std = torch.tensor(config.std, device=images.device).view(-1, 1, 1)
    return (images * std + mean).clamp(0, 1)
