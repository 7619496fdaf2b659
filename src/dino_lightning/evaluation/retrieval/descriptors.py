"""What an image becomes in retrieval and in copy detection: pixels that the network sees, and its descriptor.

The views' `config` says what they do, for the key of the feature cache.

B images of C channels, P prefix tokens (the class token first), N patches, D width.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import PatchEmbed
from torch import Tensor, nn

from dino_lightning.config import CropsConfig, DataConfig
from dino_lightning.data.crops.pil import Normalized
from dino_lightning.data.decode import Decoder
from dino_lightning.data.sources.base import content_digest
from dino_lightning.evaluation.features.images import ImageFiles
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.models.tokens import last_blocks, patch_size

SMALLEST = 32
"""Side (pixels) that every network without patches takes."""
Group = tuple[tuple[int, int] | None, list[int]]
FIXED = "JPEG", "PNG"
"""Formats whose header has the size of the decoded image; a TIFF may be turned."""


class Shrunk:
    """PIL image -> normalized tensor (C, H, W), the longer side at most `size`; a smaller image keeps its size."""

    def __init__(self, network: FrozenNetwork, *, size: int) -> None:
        self.config = ("shrunk", size, network.mean, network.std)
        self.size, self.finish = size, _normalized(network)

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Values as the network takes them."""
        assert isinstance(image, Image.Image)
        # PIL's `thumbnail` and not `resize`: it reduces by whole factors first, and so did the original.
        shrunk = image.copy()
        shrunk.thumbnail((self.size, self.size), Image.Resampling.LANCZOS)
        return self.finish(shrunk)


class Squared:
    """PIL image -> normalized tensor (C, size, size), resized (bicubic) without regard to its shape."""

    def __init__(self, network: FrozenNetwork, *, size: int) -> None:
        self.config = ("squared", size, network.mean, network.std)
        self.size, self.finish = size, _normalized(network)

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Values as the network takes them."""
        assert isinstance(image, Image.Image)
        return self.finish(image.resize((self.size, self.size), Image.Resampling.BICUBIC))


class BoxedFiles(ImageFiles):
    """Image files, each cut to its box (left, top, right, bottom), as PIL rounds and cuts."""

    def __init__(self, paths: Sequence[Path], *, boxes: Sequence[tuple[float, float, float, float]]) -> None:
        super().__init__(paths)
        self.boxes = np.array(boxes, dtype=np.float64).reshape(len(paths), 4)
        self.decode = Decoder(DataConfig()).pil

    def read(self, index: int) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Pixels (H, W, 3) of the box."""
        left, top, right, bottom = self.boxes[index].tolist()
        return np.asarray(self.decode(super().read(index)).crop((left, top, right, bottom)))

    def fingerprint(self) -> str:
        """Of the files and the boxes."""
        return content_digest(super().fingerprint().encode(), self.boxes.tobytes())


def groups_of_equal_size(paths: Sequence[Path], *, batch_size: int) -> list[Group]:
    """Positions that fill batches, as (width and height, positions), and the others, under None, to be seen one by one.

    Reads the headers of all images, unless `batch_size` is 1.
    """
    if batch_size == 1:
        return [(None, list(range(len(paths))))]
    by_size: dict[tuple[int, int] | None, list[int]] = {}
    for i, path in enumerate(paths):
        by_size.setdefault(_stored_size(path), []).append(i)
    full: list[Group] = [(size, own) for size, own in by_size.items() if size is not None and len(own) >= batch_size]
    taken = {size for size, _ in full}
    others = sorted(i for size, own in by_size.items() if size not in taken for i in own)
    return [*full, (None, others)] if others else full


def multi_scale(backbone: nn.Module, images_BCHW: Tensor, *, scales: Sequence[float]) -> Tensor:
    """The network's features (B, D), summed over scales, at length 1.

    The original divides by the norm of the whole batch, which is that of an image where the batch is one image.
    """
    total_BD = torch.zeros((), device=images_BCHW.device)
    for scale in scales:
        resized = images_BCHW
        if scale != 1:
            enough = _at_least(images_BCHW, side=math.ceil(1 / scale))
            resized = F.interpolate(enough, scale_factor=scale, mode="bilinear", align_corners=False)
        total_BD = total_BD + backbone(_in_patches(backbone, resized)).float()
    return F.normalize(total_BD, dim=1)


def cls_and_gem(backbone: nn.Module, images_BCHW: Tensor, *, power: float) -> Tensor:
    """Class token and generalized mean of the patch tokens, side by side: (B, 2 D).

    GeM = (mean of x^power)^(1 / power) over patches, values below 1e-6 raised to it.
    """
    tokens_BTD = last_blocks(backbone, images_BCHW, n=1)[0].float()
    patches_BND = tokens_BTD[:, cast(Any, backbone).num_prefix_tokens :]
    gem_BD = patches_BND.clamp(min=1e-6).pow(power).mean(dim=1).pow(1 / power)
    return torch.cat([tokens_BTD[:, 0], gem_BD], dim=1)


def _in_patches(backbone: nn.Module, images_BCHW: Tensor) -> Tensor:
    """No smaller than the network takes, and without the rows and columns that fill no patch: the original's
    convolution leaves them out, timm's refuses them."""
    patched = isinstance(getattr(backbone, "patch_embed", None), PatchEmbed)
    least, step = (patch_size(backbone),) * 2 if patched else (SMALLEST, 1)
    H, W = images_BCHW.shape[-2:]
    return _at_least(images_BCHW, side=least)[..., : max(least, H // step * step), : max(least, W // step * step)]


def _at_least(images_BCHW: Tensor, *, side: int) -> Tensor:
    """Filled up with the mean color below and to the right."""
    H, W = images_BCHW.shape[-2:]
    return F.pad(images_BCHW, (0, max(0, side - W), 0, max(0, side - H)))


def _normalized(network: FrozenNetwork) -> Normalized:
    return Normalized(CropsConfig(mean=network.mean, std=network.std))


def _stored_size(path: Path) -> tuple[int, int] | None:
    """Width and height by the header; None where only decoding tells."""
    try:
        with Image.open(path) as image:
            return image.size if image.format in FIXED else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
