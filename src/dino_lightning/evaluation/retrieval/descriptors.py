"""The views and descriptors of images in retrieval and copy detection.

The `config` of a view describes it in the key of the feature cache.

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

from dino_lightning.config import DataConfig
from dino_lightning.data.decode import Decoder
from dino_lightning.data.sources.base import content_digest
from dino_lightning.errors import UserError
from dino_lightning.evaluation.context import Task
from dino_lightning.evaluation.features.images import ListedFiles, View, ViewedImages, normalization
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.models.tokens import last_blocks, patch_size

SMALLEST = 32
"""A side (pixels) that every network without patches accepts."""
Group = tuple[tuple[int, int] | None, list[int]]
"""Width and height of images, and their indices; None for images of various sizes."""
HEADER_FORMATS = "JPEG", "PNG"
"""Formats whose header has the size of the decoded image; a TIFF may be rotated."""


class ShrinkView:
    """PIL image -> normalized tensor (C, H, W) whose longer side is at most `size`; smaller images keep their size."""

    def __init__(self, network: FrozenNetwork, *, size: int) -> None:
        self.config = ("shrunk", size, network.mean, network.std)
        self.size, self.normalize = size, normalization(network)

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """The input of the network."""
        assert isinstance(image, Image.Image)
        # PIL's `thumbnail`, as in the original; unlike `resize`, it first reduces by an integer factor.
        shrunk = image.copy()
        shrunk.thumbnail((self.size, self.size), Image.Resampling.LANCZOS)
        return self.normalize(shrunk)


class SquareView:
    """PIL image -> normalized tensor (C, size, size), resized (bicubic) without keeping the aspect ratio."""

    def __init__(self, network: FrozenNetwork, *, size: int) -> None:
        self.config = ("squared", size, network.mean, network.std)
        self.size, self.normalize = size, normalization(network)

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """The input of the network."""
        assert isinstance(image, Image.Image)
        return self.normalize(image.resize((self.size, self.size), Image.Resampling.BICUBIC))


class CroppedFiles(ListedFiles):
    """Image files, each cropped to its box (left, top, right, bottom), rounded and cropped by PIL."""

    def __init__(self, paths: Sequence[Path], *, boxes: Sequence[tuple[float, float, float, float]]) -> None:
        super().__init__(paths)
        self.boxes = np.array(boxes, dtype=np.float64).reshape(len(paths), 4)
        self.decode = Decoder(DataConfig()).pil

    def read(self, index: int) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Pixels (H, W, 3) of the box."""
        left, top, right, bottom = self.boxes[index].tolist()
        return np.asarray(self.decode(super().read(index)).crop((left, top, right, bottom)))

    def fingerprint(self) -> str:
        """A digest of the files and the boxes."""
        return content_digest(super().fingerprint().encode(), self.boxes.tobytes())


def file_images(task: Task, files: ListedFiles, view: View, *, blank: tuple[int, int, int], split: str) -> ViewedImages:
    """Image files through a view; unreadable ones are listed in `bad_images_SPLIT.txt`."""
    bad_images = task.output / f"bad_images_{split}.txt"
    return ViewedImages(files, view, blank=blank, config=DataConfig(max_bad_share=1), bad_images=bad_images)


def require_files(indices_M: Tensor, task: Task, *, key: str, images: int, split: str) -> None:
    """Raise `UserError` if none of the `images` of the folder `key` is readable."""
    if not len(indices_M):
        raise UserError(
            f"{key}: none of the {images} images for {split} can be read; see bad_images_{split}.txt in {task.output}."
        )


def groups_of_equal_size(paths: Sequence[Path], *, batch_size: int) -> list[Group]:
    """Groups of equal size that fill a batch, and a last group, without a size, of images to be processed one by one.

    Reads the headers of all images unless `batch_size` is 1.
    """
    if batch_size == 1:
        return [(None, list(range(len(paths))))]
    by_size: dict[tuple[int, int] | None, list[int]] = {}
    for i, path in enumerate(paths):
        by_size.setdefault(_stored_size(path), []).append(i)
    groups: list[Group] = [(size, group) for size, group in by_size.items() if size and len(group) >= batch_size]
    others = sorted(set(range(len(paths))) - {i for _, group in groups for i in group})
    return [*groups, (None, others)] if others else groups


def multi_scale(backbone: nn.Module, images_BCHW: Tensor, *, scales: Sequence[float]) -> Tensor:
    """The network's features (B, D), summed over scales and L2-normalized.

    The original divides by the norm of the whole batch, which is the same for batches of one image.
    """
    total_BD = torch.zeros((), device=images_BCHW.device)
    for scale in scales:
        resized = images_BCHW
        if scale != 1:
            padded = _at_least(images_BCHW, side=math.ceil(1 / scale))
            resized = F.interpolate(padded, scale_factor=scale, mode="bilinear", align_corners=False)
        total_BD = total_BD + backbone(_crop_to_patches(backbone, resized)).float()
    return F.normalize(total_BD, dim=1)


def cls_and_gem(backbone: nn.Module, images_BCHW: Tensor, *, power: float) -> Tensor:
    """Class token and generalized mean of the patch tokens, concatenated: (B, 2 D).

    GeM = (mean of x^power)^(1 / power) over patches, with values clamped to at least 1e-6.
    """
    tokens_BTD = last_blocks(backbone, images_BCHW, n=1)[0].float()
    patches_BND = tokens_BTD[:, cast(Any, backbone).num_prefix_tokens :]
    gem_BD = patches_BND.clamp(min=1e-6).pow(power).mean(dim=1).pow(1 / power)
    return torch.cat([tokens_BTD[:, 0], gem_BD], dim=1)


def _crop_to_patches(backbone: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Padded to the smallest size that the network accepts, and cropped to full patches.

    The original's convolution ignores incomplete patches; timm raises an error.
    """
    patched = isinstance(getattr(backbone, "patch_embed", None), PatchEmbed)
    least, multiple = (patch_size(backbone),) * 2 if patched else (SMALLEST, 1)
    H, W = images_BCHW.shape[-2:]
    return _at_least(images_BCHW, side=least)[
        ..., : max(least, H // multiple * multiple), : max(least, W // multiple * multiple)
    ]


def _at_least(images_BCHW: Tensor, *, side: int) -> Tensor:
    """Padded with the mean color at the bottom and right."""
    H, W = images_BCHW.shape[-2:]
    return F.pad(images_BCHW, (0, max(0, side - W), 0, max(0, side - H)))


def _stored_size(path: Path) -> tuple[int, int] | None:
    """Width and height according to the header; None if only decoding gives them."""
    try:
        with Image.open(path) as image:
            return image.size if image.format in HEADER_FORMATS else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
