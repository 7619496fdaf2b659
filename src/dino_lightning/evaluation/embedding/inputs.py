"""Images that a program passes: paths, PIL images, arrays of pixels."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from dino_lightning.data.sources.base import Content, ImageSource, content_digest
from dino_lightning.errors import UserError
from dino_lightning.evaluation.features.images import ListedFiles

ImageInput: TypeAlias = str | Path | Image.Image | np.ndarray
"""A file, a PIL image, or pixels (H, W) or (H, W, C) uint8."""

PIL_MODES = {1: "L", 3: "RGB"}
EXPECTED = "expected a path, a PIL image, or pixels (H, W) or (H, W, C) of type uint8"


class InputImages:
    """An `ImageSource` of images in memory, possibly mixed with paths, for a network with `channels` channels."""

    classes: list[str] | None = None
    labels: np.ndarray | None = None

    def __init__(self, images: Sequence[ImageInput], *, channels: int) -> None:
        self.images, self.channels = list(images), channels

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Content:
        """Pixels, or the content of the file."""
        image = self.images[index]
        if isinstance(image, str | Path):
            return Path(image).read_bytes()
        if isinstance(image, Image.Image):
            # Transparency and palettes are removed, as for files.
            return np.asarray(image.convert(PIL_MODES[self.channels]) if self.channels in PIL_MODES else image)
        return image

    def describe(self, index: int) -> str:
        """The path, or the index in the list."""
        image = self.images[index]
        return str(image) if isinstance(image, str | Path) else f"image {index}"

    def fingerprint(self) -> str:
        """A digest of all pixels and files; a missing file counts as empty."""
        return content_digest(*(self._content(index) for index in range(len(self))))

    def _content(self, index: int) -> bytes:
        try:
            content = self.read(index)
        except OSError:
            return b""
        if isinstance(content, bytes):
            return content
        return f"{content.shape} ".encode() + np.ascontiguousarray(content).tobytes()


def input_source(images: Sequence[ImageInput], channels: int) -> ImageSource:
    """The source of images from `as_image_list`."""
    if all(isinstance(image, str | Path) for image in images):
        return ListedFiles([Path(image) for image in images])  # type: ignore[arg-type]
    return InputImages(images, channels=channels)


def as_image_list(images: Any, *, key: str = "images") -> list[ImageInput]:
    """A list, an array (N, H, W, C), or a column of paths of a table as a list, possibly empty.

    Raises `UserError`, which names `key`, for anything that is not a list of images.
    """
    if isinstance(images, str | Path | Image.Image):
        raise UserError(f"{key}: {type(images).__name__} is a single image; expected a list, such as [image].")
    if hasattr(images, "columns"):  # a data frame; iterating over it would give column names
        images = images.to_numpy()
    if isinstance(images, np.ndarray):
        images = _split_array(images, key=key)
    if not isinstance(images, Iterable):
        raise UserError(f"{key}: {type(images).__name__} is not a list; {EXPECTED} in a list.")
    images = [_expand_home(image) for image in images]
    for i, image in enumerate(images):
        if isinstance(image, Image.Image) and image.mode[0] in "IF":
            raise UserError(f"{key}[{i}] is a PIL image of mode {image.mode}; expected a mode with 8 bits.")
        if isinstance(image, str | Path | Image.Image):
            continue
        if not isinstance(image, np.ndarray):
            raise UserError(f"{key}[{i}] is of type {type(image).__name__}; {EXPECTED}.")
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise UserError(f"{key}[{i}] is an array {image.shape} of {image.dtype}; {EXPECTED}.")
    return images


def _expand_home(image: Any) -> Any:
    """Expand `~` in a path; anything else is returned unchanged."""
    if not isinstance(image, str | Path):
        return image
    path = os.path.expanduser(image)
    return Path(path) if isinstance(image, Path) else path


def _split_array(images: np.ndarray, *, key: str) -> np.ndarray:
    """The images of an array. Raises `UserError` for an array that could also be a single image."""
    if images.ndim == 4 or (images.ndim and images.dtype.kind in "OU"):
        return images[:, 0] if images.ndim == 2 and images.shape[1] == 1 else images
    raise UserError(
        f"{key} is an array {images.shape} of {images.dtype}; expected (N, H, W, C) of type uint8, or a list of images."
    )
