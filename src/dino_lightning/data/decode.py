"""Decodes stored images to uint8 pixels with the configured number of channels.

torchvision decodes JPEG, PIL other formats, and tifffile the TIFF files that PIL cannot represent.

- One or three channels: PIL's `convert("L")` or `convert("RGB")`, for any stored image. Two, four and more channels
  must be stored: gray with alpha, RGBA, TIFF with several samples or pages, arrays (H, W, C).
- More than 8 bits: `data.value_range` is mapped to 0 to 255, rounded and clipped; NaN and infinite values become
  `data.nan_value`, or cause an error. Without a range such an image is an error, except 16-bit color in PNG and TIFF,
  of which PIL keeps the upper 8 bits; with a range such a PNG is an error.
- Of an animation or a TIFF with several pages, the first image is used. The orientation of a TIFF is always applied,
  because PIL does so; that of other formats only with `data.apply_exif_rotation`.
"""

import io
import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from dino_lightning.config import DataConfig
from dino_lightning.data.decode_formats import check_tiff_pages, read_npy
from dino_lightning.data.sources.base import Content
from dino_lightning.errors import UserError

JPEG = b"\xff\xd8\xff"
NPY = b"\x93NUMPY"
PNG = b"\x89PNG\r\n\x1a\n"
DEEP_COLOR_PNG = (b"\x10\2", b"\x10\4", b"\x10\6")
"""Bit depth (16) and color type (RGB, gray with alpha, RGBA), bytes 24 and 25 of a PNG."""
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

PIL_MODES = {1: "L", 3: "RGB"}
"""Numbers of channels to which PIL converts every image."""
TRANSPOSED, FLIPPED_X, FLIPPED_Y = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)
"""EXIF and TIFF orientations that transpose, and then mirror, an image."""
MINISBLACK, RGB, SEPARATED, BITS_PER_SAMPLE, SAMPLES, ORIENTATION = 1, 2, 5, 258, 277, 274
"""Color spaces and tags of a TIFF."""

# Too many pixels are an error below; the other warnings are about a file's metadata or palette, once per image.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
# It would print a line for each invalid tag, of which a broken file has thousands.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class UnreadableImageError(ValueError):
    """An image that cannot be used; the message says why, for the user."""


class Decoder:
    """Stored image -> PIL image or tensor. Raises `UnreadableImageError` for broken or unsuitable images."""

    def __init__(self, config: DataConfig) -> None:
        self.channels, self.apply_exif_rotation = config.channels, config.apply_exif_rotation
        self.value_range, self.nan_value = config.value_range, config.nan_value

    def pil(self, content: Content) -> Image.Image:
        """The image in mode RGB, or L with one channel."""
        if self.channels not in PIL_MODES:
            raise UnreadableImageError(f"PIL supports only 1 and 3 channels, not data.channels={self.channels}")
        with _as_unreadable():
            decoded = self._decoded(content)
            image = _as_image(decoded) if isinstance(decoded, np.ndarray) else decoded
            _check_not_one_pixel(image.width * image.height)
            return image

    def pixels(self, content: Content) -> Tensor:
        """Pixels (C, H, W) uint8, channels last in memory (except for rotated photographs)."""
        with _as_unreadable():
            if isinstance(content, bytes) and content.startswith(JPEG) and (pixels := self._jpeg(content)) is not None:
                _check_not_one_pixel(pixels[0].numel())
                return pixels
            array = np.array(self._decoded(content))
            _check_not_one_pixel(array.shape[0] * array.shape[1])
            return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)

    def stored(self, content: Content) -> Image.Image | np.ndarray:
        """The stored values: a PIL image with 8 bits, or an array (H, W) or (H, W, C) of any number type."""
        with _as_unreadable():
            return self._open(content)

    def _jpeg(self, content: bytes) -> Tensor | None:
        """The pixels, or None if PIL must decode the image."""
        size, components = _jpeg_header(content)
        # PIL converts color to gray differently from the luminance that a JPEG stores.
        if not 0 < size <= _max_pixels() or not (self.channels == 3 or self.channels == components == 1):
            return None
        mode = ImageReadMode.RGB if self.channels == 3 else ImageReadMode.GRAY
        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)  # copying takes a microsecond
        try:
            return decode_jpeg(encoded, mode, apply_exif_orientation=self.apply_exif_rotation)  # type: ignore[return-value]
        except RuntimeError:
            return None

    def _decoded(self, content: Content) -> Image.Image | np.ndarray:
        """The image with the configured number of channels: in mode L or RGB, or an array (H, W, C) uint8."""
        stored = self._open(content)
        if isinstance(stored, np.ndarray):
            array = self._to_8_bits(stored)
            if array.shape[2] == self.channels:
                return array
            if not {array.shape[2], self.channels} <= set(PIL_MODES):
                self._raise_wrong_channels(array.shape[2], stored)
            stored = _as_image(array)
        if self.channels in PIL_MODES:
            return stored.convert(PIL_MODES[self.channels])
        if stored.mode in ("P", "PA"):
            stored = stored.convert("RGBA" if stored.mode == "PA" or "transparency" in stored.info else "RGB")
        if len(stored.getbands()) != self.channels:
            self._raise_wrong_channels(len(stored.getbands()), stored)
        return np.asarray(stored)

    def _to_8_bits(self, array: np.ndarray) -> np.ndarray:
        """(H, W, C) uint8."""
        if array.ndim not in (2, 3) or not array.size:
            raise UnreadableImageError(f"array of shape {array.shape}; expected (H, W) or (H, W, C)")
        array = array[..., None] if array.ndim == 2 else array
        if array.dtype == np.uint8:
            return array
        if array.dtype == np.bool_:
            return array * np.uint8(255)
        if array.dtype.kind not in "uif":
            raise UnreadableImageError(f"array of {array.dtype}; expected numbers")
        if self.value_range is None:
            bits = "float" if array.dtype.kind == "f" else f"{array.dtype.itemsize * 8}-bit"
            example = "[0,1]" if array.dtype.kind == "f" else "[0,65535]"
            raise UnreadableImageError(f"{bits} image; set data.value_range, such as {example}")
        array = self._finite(array) if array.dtype.kind == "f" else array
        low, high = self.value_range
        with np.errstate(over="ignore"):
            scaled = (array.astype(np.result_type(array.dtype, np.float32)) - low) * (255 / (high - low))
        return scaled.clip(0, 255).round().astype(np.uint8)

    def _finite(self, array: np.ndarray) -> np.ndarray:
        """The array with `data.nan_value` instead of NaN and infinite values; an error if it is not set."""
        finite = np.isfinite(array)
        if finite.all():
            return array
        if self.nan_value is None:
            count = finite.size - int(finite.sum())
            raise UnreadableImageError(
                f"{count} of {finite.size} values are NaN or infinite; set data.nan_value to the value that "
                "replaces them"
            )
        return np.where(finite, array, np.asarray(self.nan_value, array.dtype))

    def _raise_wrong_channels(self, channels: int, stored: Image.Image | np.ndarray) -> NoReturn:
        hint = ""
        if isinstance(stored, np.ndarray) and stored.ndim == 3 and stored.shape[0] == self.channels:
            hint = f" (the shape is {stored.shape}; expected (H, W, {self.channels}))"
        raise UnreadableImageError(f"the image has {channels} channels, but data.channels={self.channels}{hint}")

    def _open(self, content: Content) -> Image.Image | np.ndarray:
        if isinstance(content, np.ndarray):
            return content
        if not content:
            raise UnreadableImageError("the file is empty")
        if content.startswith(NPY):
            return read_npy(content)
        if self.value_range is not None and content.startswith(PNG) and content[24:26] in DEEP_COLOR_PNG:
            # torchvision could read all 16 bits, but a broken file would crash the process.
            raise UnreadableImageError(
                "16-bit color PNG can only be read with 8 bits; unset data.value_range, or store TIFF"
            )
        if content.startswith(TIFF):
            return self._tiff(content)
        image = self._with_pil(content)
        if content.startswith(PNG) and content[24:26] == DEEP_COLOR_PNG[1]:
            image = image.convert("LA")  # PIL opens it as RGBA
        return np.asarray(image) if _is_deep(image) else image

    def _with_pil(self, content: bytes) -> Image.Image:
        try:
            image = Image.open(io.BytesIO(content))
        except UnidentifiedImageError:
            raise UnreadableImageError(
                f"not an image format that PIL supports; the file begins with {content[:12]!r}"
            ) from None
        _check_size(image.width * image.height)
        return ImageOps.exif_transpose(image) if self.apply_exif_rotation else image

    def _tiff(self, content: bytes) -> Image.Image | np.ndarray:
        """PIL's image if it contains all needed values of the file, otherwise tifffile's array."""
        try:
            image: Any = self._with_pil(content)
        except UnreadableImageError:
            return self._with_tifffile(content)
        tags = getattr(image, "tag_v2", {})
        bits, samples = max(tags.get(BITS_PER_SAMPLE, (8,))), tags.get(SAMPLES, 1)
        reduced = bits > 8 and not _is_deep(image)
        if self.channels in PIL_MODES and not _is_deep(image) and not (reduced and self.value_range is not None):
            return image
        try:
            return self._with_tifffile(content)
        except (ValueError, ImportError):
            # PIL supports compressions for which tifffile needs the package imagecodecs.
            if reduced or samples != len(image.getbands()):
                raise
            return np.asarray(image) if _is_deep(image) else image

    def _with_tifffile(self, content: bytes) -> np.ndarray:
        import tifffile  # few datasets need it

        check_tiff_pages(content)
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            page: Any = file.pages[0]
            series = file.series[0]
            pages = page if self.channels in PIL_MODES or len(series.axes) > 3 else series
            _check_size(math.prod(pages.shape) // max(self.channels, 4))
            if page.photometric not in (MINISBLACK, RGB, SEPARATED):
                raise UnreadableImageError(f"TIFF with an unsupported color space (photometric {page.photometric})")
            array = self._channels_last(pages.asarray(), pages.axes)
            if self.channels in PIL_MODES and page.photometric == RGB:
                array = array[..., :3]
            elif self.channels in PIL_MODES and array.ndim == 3 and array.shape[2] == 2 and page.extrasamples[0] > 0:
                array = array[..., 0]  # the other channel is alpha
            tag = page.tags.get(ORIENTATION)
            return _upright(array, orientation=1 if tag is None else int(tag.value))

    def _channels_last(self, array: np.ndarray, axes: str) -> np.ndarray:
        """(H, W) or (H, W, C), by tifffile's names of the axes."""
        others = [axis for axis in axes if axis not in "YX"]
        if len(others) != 1 or array.ndim != 3:
            return array
        # `imwrite` without options stores an array (H, W, C) as H pages (W, C), without recording that.
        if others == ["Q"] and array.shape[0] != self.channels and array.shape[2] == self.channels:
            return array
        return np.moveaxis(array, axes.index(others[0]), -1)


@contextmanager
def _as_unreadable() -> Iterator[None]:
    """Convert the errors that libraries raise for broken data to `UnreadableImageError`."""
    try:
        yield
    except (UserError, UnreadableImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        match = re.search(r"\((\d+) pixels", str(error))
        raise UnreadableImageError(_too_large(int(match[1])) if match else str(error)) from error
    except Exception as error:
        text = " ".join(str(error).split()) or "no reason given"
        by_pil = isinstance(error, OSError)  # its messages are readable
        raise UnreadableImageError(text if by_pil else f"broken file ({type(error).__name__}: {text})") from error


def _jpeg_header(content: bytes) -> tuple[int, int]:
    """Numbers of pixels and components; zeros if the header is not at its regular position."""
    i = 2
    while i + 10 <= len(content) and content[i] == 0xFF:
        marker = content[i + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(content[i + 5 : i + 7]) * int.from_bytes(content[i + 7 : i + 9]), content[i + 9]
        i += 2 + int.from_bytes(content[i + 2 : i + 4])
    return 0, 0


def _max_pixels() -> float:
    return Image.MAX_IMAGE_PIXELS or math.inf


def _check_size(pixels: int) -> None:
    if pixels > _max_pixels():
        raise UnreadableImageError(_too_large(pixels))


def _check_not_one_pixel(pixels: int) -> None:
    if pixels < 2:
        raise UnreadableImageError("a single pixel, so all crops would be identical")


def _too_large(pixels: int) -> str:
    return f"{pixels / 1e6:.1f} megapixels; PIL's limit is {_max_pixels() / 1e6:.1f}"


def _is_deep(image: Image.Image) -> bool:
    """Whether it has values with more than 8 bits, which PIL's `convert` would clip at 255."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _as_image(array_HWC: np.ndarray) -> Image.Image:
    """The PIL image of one or three channels uint8."""
    return Image.fromarray(np.ascontiguousarray(array_HWC[..., 0] if array_HWC.shape[2] == 1 else array_HWC))


def _upright(array: np.ndarray, *, orientation: int) -> np.ndarray:
    """(H, W) or (H, W, C), rotated and mirrored as the tag `orientation` says."""
    array = array.swapaxes(0, 1) if orientation in TRANSPOSED else array
    array = array[:, ::-1] if orientation in FLIPPED_X else array
    return array[::-1] if orientation in FLIPPED_Y else array
