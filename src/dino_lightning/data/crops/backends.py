"""The three back ends of `crops`: images and seeds -> a batch of crops.

`pil` and `cpu` augment a batch in the loader process; `device` returns `RawCrops`, which `RawCrops.augment` augments on
the accelerator. A batch is V tensors (B, C, size, size): two global crops, then `local_count` local ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from dino_lightning.config import CropsConfig
from dino_lightning.data.crops.device_plan import DevicePlan, make_device_plan
from dino_lightning.data.crops.photometric import augment
from dino_lightning.data.crops.pil import PILCrops
from dino_lightning.data.crops.sampling import Crop, FastRNG, sample_crops

GLOBAL_COUNT = 2

Decoding: TypeAlias = Literal["pil", "pixels"]
"""Input of a back end: PIL images, or tensors (C, H, W) uint8."""


def without_color(config: CropsConfig) -> CropsConfig:
    """The augmentation of images that are not RGB: without saturation, hue and grayscale."""
    return replace(config, saturation=0.0, hue=0.0, grayscale_p=0.0)


class PILBatches:
    """`crops=pil`."""

    decoding: Decoding = "pil"

    def __init__(self, config: CropsConfig) -> None:
        self.crops = PILCrops(config)

    def __call__(self, images: Sequence[Image.Image], seeds: Sequence[int]) -> list[Tensor]:
        """V tensors (B, C, size, size)."""
        batch: list[Tensor] = []
        for b, (image, seed) in enumerate(zip(images, seeds, strict=True)):
            crops = self.crops(image, seed=seed)
            batch = batch or [crop.new_empty(len(images), *crop.shape) for crop in crops]
            for view, crop in zip(batch, crops, strict=True):
                view[b] = crop
        return batch


class DeviceBatches:
    """`crops=device`: only crops and resizes here; the rest follows on the device."""

    decoding: Decoding = "pixels"

    def __init__(self, config: CropsConfig) -> None:
        self.config = config

    def __call__(self, images: Sequence[Tensor], seeds: Sequence[int]) -> "RawCrops":
        """The raw crops and their augmentation parameters."""
        crops = [image_crops(self.config, image, seed) for image, seed in zip(images, seeds, strict=True)]
        return RawCrops([raw_crop_group(images, crops, views) for views in view_groups(self.config)])


class CPUBatches:
    """`crops=cpu`: compiled loops augment each crop."""

    decoding: Decoding = "pixels"

    def __init__(self, config: CropsConfig) -> None:
        from dino_lightning.data.crops.numba import Finisher  # numba imports slowly

        self.config, self.finish = config, Finisher(config)

    def __call__(self, images: Sequence[Tensor], seeds: Sequence[int]) -> list[Tensor]:
        """V tensors (B, C, size, size), views of one tensor per size."""
        crops = [image_crops(self.config, image, seed) for image, seed in zip(images, seeds, strict=True)]
        batch: list[Tensor] = []
        for views in view_groups(self.config):
            size = crops[0][views[0]].size
            out_BVCSS = torch.empty(len(images), len(views), len(images[0]), size, size)
            for image, crops_V, out_VCSS in zip(images, crops, out_BVCSS, strict=True):
                for view, out_CSS in zip(views, out_VCSS, strict=True):
                    self.finish(raw_crop(image, crops_V[view]), crops_V[view], out=out_CSS)
            batch += out_BVCSS.unbind(1)
        return batch


CropBackend: TypeAlias = PILBatches | CPUBatches | DeviceBatches
"""Images of the type in `decoding`, each with the seed of its crops -> a batch."""
BACKENDS: dict[str, type[CropBackend]] = {"pil": PILBatches, "cpu": CPUBatches, "device": DeviceBatches}


def crop_backend(config: CropsConfig, *, channels: int) -> CropBackend:
    """The configured back end, without color operators unless images have three channels."""
    return BACKENDS[config.backend](config if channels == 3 else without_color(config))


@dataclass
class RawCropGroup:
    """Some views of B images with one size: crops (B × views, C, size, size) uint8 in the order of the plan."""

    crops: Tensor
    plan: DevicePlan
    views: int


@dataclass
class RawCrops:
    """A batch that is augmented on the accelerator."""

    groups: list[RawCropGroup]

    def to(self, device: torch.device | str) -> "RawCrops":
        """The batch on a device; Lightning calls it."""
        options: dict[str, Any] = {"device": device, "non_blocking": torch.device(device).type == "cuda"}
        return self._changed(lambda tensor: tensor.to(**options))

    def pin_memory(self) -> "RawCrops":
        """The batch in page-locked memory; PyTorch's loader calls it."""
        return self._changed(Tensor.pin_memory)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "RawCrops":
        return RawCrops([RawCropGroup(change(g.crops), g.plan.changed(change), g.views) for g in self.groups])

    @torch.no_grad()
    def augment(self, config: CropsConfig) -> list[Tensor]:
        """The augmented batch; overwrites the crops."""
        augmented = ((group, augment(group.crops, group.plan, config)) for group in self.groups)
        return [view for group, crops in augmented for view in crops.unflatten(0, (-1, group.views)).unbind(1)]


def image_crops(config: CropsConfig, image_CHW: Tensor, seed: int) -> list[Crop]:
    """The parameters of the crops of one image."""
    _, height, width = image_CHW.shape
    return sample_crops(config, width=width, height=height, rng=FastRNG(seed))


def view_groups(config: CropsConfig) -> list[range]:
    """The views, grouped by size."""
    groups = range(GLOBAL_COUNT), range(GLOBAL_COUNT, GLOBAL_COUNT + config.local_count)
    return [views for views in groups if views]


def raw_crop_group(images: Sequence[Tensor], crops: list[list[Crop]], views: range) -> RawCropGroup:
    """Some views of every image, in the order of their plan."""
    pairs = [(image, crops_V[view]) for image, crops_V in zip(images, crops, strict=True) for view in views]
    plan = make_device_plan([crop for _, crop in pairs])
    size = pairs[0][1].size
    out = torch.empty(len(pairs), len(images[0]), size, size, dtype=torch.uint8, memory_format=torch.channels_last)
    for position, i in enumerate(plan.order):
        out[position] = raw_crop(*pairs[i])
    return RawCropGroup(out, plan, len(views))


def raw_crop(image_CHW: Tensor, crop: Crop) -> Tensor:
    """One crop, resized with the bicubic interpolation of PIL (C, size, size)."""
    top, left, height, width = crop.box
    box = image_CHW[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
    # torchvision's `resize` calls this, too, but its dispatch is slow for a small crop.
    return interpolate(box, size=(crop.size, crop.size), mode="bicubic", antialias=True)[0]
