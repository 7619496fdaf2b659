"""The three back ends of `crops`: images and seeds in, a batch of crops out.

`pil` and `cpu` finish a batch where they are called, in a loader process; `device` returns `CutCrops`, which
`CutCrops.augment` finishes on the accelerator. A batch is V tensors (B, C, size, size): two global crops, then
`local_count` local ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from dino_lightning.config import CropsConfig
from dino_lightning.data.crops.device_plan import Plan, make_plan
from dino_lightning.data.crops.photometric import augment
from dino_lightning.data.crops.pil import PILCrops
from dino_lightning.data.crops.sampling import Crop, FastRNG, draw_crops
from dino_lightning.errors import UserError, did_you_mean

GLOBAL_COUNT = 2

Decoding: TypeAlias = Literal["pil", "pixels"]
"""What a back end takes: PIL images, or tensors (C, H, W) uint8."""


class CropBackend(Protocol):
    """Images and their seeds -> a batch."""

    decoding: Decoding

    def __call__(self, images: Sequence[Any], seeds: Sequence[int]) -> "list[Tensor] | RawCrops":
        """Images as `decoding` says, each with the seed of its crops."""
        ...


def crop_backend(config: CropsConfig, *, channels: int) -> CropBackend:
    """The configured back end, without operators that need color where there is none."""
    config = config if channels == 3 else without_color(config)
    match config.backend:
        case "pil":
            return PILBatches(config)
        case "cpu":
            return CPUBatches(config)
        case "device":
            return DeviceBatches(config)
        case other:
            raise UserError(f"crops.backend={other}: {did_you_mean(other, ('pil', 'cpu', 'device'))}")


def without_color(config: CropsConfig) -> CropsConfig:
    """The augmentation of images that are not RGB: no saturation, no hue, no grayscale."""
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
    """`crops=device`: decoded images are cut here, everything else happens later."""

    decoding: Decoding = "pixels"

    def __init__(self, config: CropsConfig) -> None:
        self.config = config

    def __call__(self, images: Sequence[Tensor], seeds: Sequence[int]) -> "RawCrops":
        """The cut crops and what is to be done with them."""
        drawn = [draw(self.config, image, seed) for image, seed in zip(images, seeds, strict=True)]
        return RawCrops([cut_views(images, drawn, views) for views in view_groups(self.config)])


class CPUBatches:
    """`crops=cpu`: every crop is finished where it was cut."""

    decoding: Decoding = "pixels"

    def __init__(self, config: CropsConfig) -> None:
        from dino_lightning.data.crops.numba import Finisher  # numba: only who needs it pays for the import

        self.config, self.finish = config, Finisher(config)

    def __call__(self, images: Sequence[Tensor], seeds: Sequence[int]) -> list[Tensor]:
        """V tensors (B, C, size, size), views of one tensor per size."""
        drawn = [draw(self.config, image, seed) for image, seed in zip(images, seeds, strict=True)]
        batch: list[Tensor] = []
        for views in view_groups(self.config):
            size = drawn[0][views[0]].size
            whole_BV = torch.empty(len(images), len(views), len(images[0]), size, size)
            for image, crops, out_V in zip(images, drawn, whole_BV, strict=True):
                for view, out in zip(views, out_V, strict=True):
                    self.finish(cut(image, crops[view]), crops[view], out=out)
            batch += whole_BV.unbind(1)
        return batch


@dataclass
class RawCropGroup:
    """Some views of B images at one size: crops (B × views, C, size, size) uint8 in the order of their plan."""

    crops: Tensor
    plan: Plan
    views: int


@dataclass
class RawCrops:
    """A batch on its way to the accelerator."""

    groups: list[RawCropGroup]

    def to(self, device: torch.device | str) -> "RawCrops":
        """The batch on a device; Lightning calls it."""
        non_blocking = torch.device(device).type == "cuda"
        return RawCrops(
            [
                RawCropGroup(
                    group.crops.to(device, non_blocking=non_blocking),
                    group.plan.to(device, non_blocking=non_blocking),
                    group.views,
                )
                for group in self.groups
            ]
        )

    def pin_memory(self) -> "RawCrops":
        """The batch in page-locked memory; PyTorch's loader calls it."""
        return RawCrops([RawCropGroup(g.crops.pin_memory(), g.plan.pin_memory(), g.views) for g in self.groups])

    @torch.no_grad()
    def augment(self, config: CropsConfig) -> list[Tensor]:
        """The finished batch; overwrites the crops."""
        finished = ((group, augment(group.crops, group.plan, config)) for group in self.groups)
        return [view for group, crops in finished for view in crops.unflatten(0, (-1, group.views)).unbind(1)]


def draw(config: CropsConfig, image_CHW: Tensor, seed: int) -> list[Crop]:
    """The crops of one image."""
    _, height, width = image_CHW.shape
    return draw_crops(config, width=width, height=height, dice=FastRNG(seed))


def view_groups(config: CropsConfig) -> list[range]:
    """Views of one size each."""
    groups = range(GLOBAL_COUNT), range(GLOBAL_COUNT, GLOBAL_COUNT + config.local_count)
    return [views for views in groups if views]


def cut_views(images: Sequence[Tensor], drawn: list[list[Crop]], views: range) -> RawCropGroup:
    """Cut some views of every image, in the order of their plan."""
    crops = [(image, one[view]) for image, one in zip(images, drawn, strict=True) for view in views]
    plan = make_plan([crop for _, crop in crops])
    size = crops[0][1].size
    out = torch.empty(len(crops), len(images[0]), size, size, dtype=torch.uint8, memory_format=torch.channels_last)
    for position, i in enumerate(plan.order):
        out[position] = cut(*crops[i])
    return RawCropGroup(out, plan, len(views))


def cut(image_CHW: Tensor, crop: Crop) -> Tensor:
    """Cut out and resize one crop (C, size, size): the bicubic interpolation of PIL."""
    top, left, height, width = crop.box
    box = image_CHW[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
    # What torchvision's `resize` calls in the end, without its dispatch, which a small crop feels.
    return interpolate(box, size=(crop.size, crop.size), mode="bicubic", antialias=True)[0]
