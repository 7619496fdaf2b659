"""The original's augmentation, reimplemented with the public operators of torchvision and PIL, for comparison."""

import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode


class Blur:
    """Gaussian blur with probability `p` and a random radius (pixels)."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur or return the image."""
        if random.random() > self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


class Solarize:
    """Solarization (inversion of bright values) with probability `p`."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        """Solarize or return the image."""
        return ImageOps.solarize(image) if random.random() < self.p else image


def view(size: int, scale: tuple[float, float], *after: Callable) -> transforms.Compose:
    """The transform of one type of view, with `after` following the color changes."""
    jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(p=0.5),
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            *after,
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


class OriginalCrops(Dataset[list[Tensor]]):
    """Two global and eight local crops of each file, as in the original's dataset."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.first = view(224, (0.4, 1.0), Blur(1.0))
        self.second = view(224, (0.4, 1.0), Blur(0.1), Solarize(0.2))
        self.local = view(96, (0.05, 0.4), Blur(0.5))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> list[Tensor]:
        with Image.open(self.files[index]) as file:
            return self.crops(file.convert("RGB"))

    def crops(self, image: Image.Image) -> list[Tensor]:
        """Ten crops of an image."""
        return [self.first(image), self.second(image), *(self.local(image) for _ in range(8))]
