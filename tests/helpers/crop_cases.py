"""Images and single crops for the tests of the augmentation, and crops computed by each implementation."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_lightning.config import CropsConfig
from dino_lightning.data.crops import RawCrops, crop_backend, pil
from dino_lightning.data.crops.device_plan import make_device_plan
from dino_lightning.data.crops.numba import Finisher
from dino_lightning.data.crops.photometric import augment
from dino_lightning.data.crops.sampling import CONTRAST, Crop

RAW = CropsConfig(mean=[0.0] * 3, std=[1 / 255] * 3)
"""Settings whose crops have values from 0 to 255."""
SMALL = dataclasses.replace(RAW, global_size=48, local_size=24, local_count=2)
BACKENDS = ("pil", "cpu", "device")


def smooth(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """An image of smooth color gradients."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def noise(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """An image of independent random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def picture(width: int = 40, height: int = 30, *, seed: int = 0) -> Image.Image:
    """Smooth colors with some noise, so that cut, blur and color changes are all visible."""
    rough = np.random.default_rng(seed).normal(0, 12, (height, width, 3))
    return Image.fromarray((np.asarray(smooth(width, height, seed=seed)) + rough).clip(0, 255).astype(np.uint8))


def photographs(shared_data: Path) -> list[Image.Image]:
    """One frame of each DAVIS sequence."""
    frames = sorted((shared_data / "davis_mini6" / "JPEGImages" / "480p").glob("*/00000.jpg"))
    assert frames
    return [Image.open(frame).convert("RGB") for frame in frames]


def pixels(image: Image.Image) -> Tensor:
    """The pixels of an image (C, H, W) as uint8."""
    values = np.array(image)
    return torch.from_numpy(values.reshape(image.height, image.width, -1)).permute(2, 0, 1).contiguous()


def crop_of(size: int, **changes: Any) -> Crop:
    """A crop that is the complete square image without augmentation, except for `changes`."""
    unchanged = Crop(box=(0, 0, size, size), size=size, flip=False, jitter=(), gray=False, blur=0.0, solarize=False)
    return dataclasses.replace(unchanged, **changes)


def with_tensors(crops: list[Crop], cut_NCSS: Tensor, config: CropsConfig = RAW) -> Tensor:
    """Cut crops, in the order of the batch, augmented as one tensor; also checks that the compiled loops agree."""
    plan = make_device_plan(crops)
    ours = augment(cut_NCSS[plan.order].clone(), plan, config)
    check_agree(ours, with_loops(crops, cut_NCSS, config), crops=crops, config=config)
    return ours


def with_loops(crops: list[Crop], cut_NCSS: Tensor, config: CropsConfig = RAW) -> Tensor:
    """The same with the compiled loops."""
    finish, out = Finisher(config), torch.empty(cut_NCSS.shape)
    for crop, image, result in zip(crops, cut_NCSS, out, strict=True):
        finish(image, crop, out=result)
    return out


def check_agree(ours: Tensor, others: Tensor, *, crops: list[Crop], config: CropsConfig = RAW) -> None:
    """Check that two float32 implementations compute the same crops (N, C, S, S).

    Another order of summation can round a mean differently, which changes the contrast by less than one step, or move a
    value across the threshold of solarization.
    """
    scale = torch.tensor(config.std).view(-1, 1, 1) * 255
    for mine, other, crop in zip(ours, others, crops, strict=True):
        difference = (mine - other).abs() * scale
        contrasts = any(part == CONTRAST for part, _ in crop.jitter)
        if crop.solarize:
            difference = difference.flatten().sort().values[: -max(1, difference.numel() // 1000)]
        assert difference.max() < (1.0 if contrasts else 0.01)
        assert difference.median() < 0.01 or contrasts


def with_pil(crops: list[Crop], images: list[Image.Image], *, threshold: int = 128) -> Tensor:
    """The same with the operators of PIL, values from 0 to 255."""
    pairs = zip(crops, images, strict=True)
    return torch.stack([pixels(pil.apply(crop, image, threshold=threshold)) for crop, image in pairs]).float()


def finished(backend: str, config: CropsConfig, images: Sequence[Image.Image], seeds: Sequence[int]) -> list[Tensor]:
    """The batch of a back end; the GPU part of `device` runs on the CPU."""
    make = crop_backend(dataclasses.replace(config, backend=backend), channels=len(images[0].getbands()))
    batch = make([image if make.decoding == "pil" else pixels(image) for image in images], seeds)
    return batch.augment(config) if isinstance(batch, RawCrops) else batch
