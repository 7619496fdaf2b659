"""Images that a program hands over: paths, PIL images, arrays of pixels."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from dino_lightning.data.sources.base import Content, ImageSource, content_digest
from dino_lightning.errors import UserError
from dino_lightning.evaluation.features.images import ImageFiles

ImageInput: TypeAlias = str | Path | Image.Image | np.ndarray
"""A file, a PIL image, or pixels (H, W) or (H, W, C) uint8."""

PIL_MODES = {1: "L", 3: "RGB"}
EXPECTED = "expected a path, a PIL image, or pixels (H, W) or (H, W, C) of type uint8"


class PixelImages:
    """An `ImageSource` of images in memory, some of which may be paths, for a network of `channels` channels."""

    classes: list[str] | None = None
    labels: np.ndarray | None = None

    def __init__(self, images: Sequence[ImageInput], *, channels: int) -> None:
        self.images, self.channels = list(images), channels

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Content:
        """Pixels, or the file's bytes."""
        image = self.images[index]
        if isinstance(image, str | Path):
            return Path(image).read_bytes()
        if isinstance(image, Image.Image):
            # Transparency and palettes go as they do for files.
            return np.asarray(image.convert(PIL_MODES[self.channels]) if self.channels in PIL_MODES else image)
        return image

    def describe(self, index: int) -> str:
        """The path, or the place in the list."""
        image = self.images[index]
        return str(image) if isinstance(image, str | Path) else f"image {index}"

    def fingerprint(self) -> str:
        """Of all pixels and files; a file that is missing counts as empty."""
        return content_digest(*(self._content(index) for index in range(len(self))))

    def _content(self, index: int) -> bytes:
        try:
            content = self.read(index)
        except OSError:
            return b""
        if isinstance(content, bytes):
            return content
        return f"{content.shape} ".encode() + np.ascontiguousarray(content).tobytes()


def given_source(images: Sequence[ImageInput], channels: int) -> ImageSource:
    """The images, as `given_list` made them, by index."""
    if all(isinstance(image, str | Path) for image in images):
        return ImageFiles([Path(image) for image in images])  # type: ignore[arg-type]
    return PixelImages(images, channels=channels)


def as_image_list(images: Any, *, key: str = "images") -> list[ImageInput]:
    """A list, an array (N, H, W, C), or a table's column of paths as a list; an empty one where there are none.

    Raises `UserError`, which names `key`, for what holds no images.
    """
    if isinstance(images, str | Path | Image.Image):
        raise UserError(f"{key}: {type(images).__name__} is a single image; expected a list, such as [image].")
    if hasattr(images, "columns"):  # a data frame, whose iteration gives the names of its columns
        images = images.to_numpy()
    if isinstance(images, np.ndarray):
        images = _rows(images, key=key)
    if not isinstance(images, Iterable):
        raise UserError(f"{key}: {type(images).__name__} is no list; {EXPECTED} in a list.")
    found = [_at_home(image) for image in images]
    for place, image in enumerate(found):
        if isinstance(image, Image.Image) and image.mode[0] in "IF":
            raise UserError(f"{key}[{place}] is a PIL image of mode {image.mode}; expected one of 8 bits.")
        if isinstance(image, str | Path | Image.Image):
            continue
        if not isinstance(image, np.ndarray):
            raise UserError(f"{key}[{place}] is of type {type(image).__name__}; {EXPECTED}.")
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise UserError(f"{key}[{place}] is an array {image.shape} of {image.dtype}; {EXPECTED}.")
    return found


def _at_home(image: Any) -> Any:
    """A path with the home folder in the place of `~`; whatever else it is, as it is."""
    if not isinstance(image, str | Path):
        return image
    path = os.path.expanduser(image)
    return Path(path) if isinstance(image, Path) else path


def _rows(images: np.ndarray, *, key: str) -> np.ndarray:
    """An array's images one after another; what could be one image as well as many is refused."""
    if images.ndim == 4 or (images.ndim and images.dtype.kind in "OU"):
        return images[:, 0] if images.ndim == 2 and images.shape[1] == 1 else images
    raise UserError(
        f"{key} is an array {images.shape} of {images.dtype}; expected (N, H, W, C) of type uint8, or a list of images."
    )
