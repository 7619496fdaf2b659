"""From an image as it is stored to pixels: uint8, with the configured number of channels.

JPEG goes through torchvision, the rest through PIL; TIFF that PIL cannot represent goes through tifffile.

- One or three channels: PIL's `convert("L")` or `convert("RGB")`, whatever is stored. Two, four and more must be stored
  so: gray with alpha, RGBA, TIFF of several samples or pages, arrays (H, W, C).
- More than 8 bits: `data.value_range` becomes 0 to 255, rounded and cut off; NaN and infinite values become
  `data.nan_value`, or the image is refused. Without a range such an image is refused, except 16-bit color in PNG and
TIFF, of which PIL keeps the upper 8 bits; with it such a PNG is refused. - Animations and TIFF of several pages show
  other formats only with `data.apply_exif_rotation`.
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
from dino_lightning.data.decode_formats import check_pages
from dino_lightning.data.npy import read_npy
from dino_lightning.data.sources.base import Content
from dino_lightning.errors import UserError

JPEG = b"\xff\xd8\xff"
NPY = b"\x93NUMPY"
PNG = b"\x89PNG\r\n\x1a\n"
DEEP_COLOR_PNG = (b"\x10\2", b"\x10\4", b"\x10\6")
"""Depth (16) and kind (RGB, gray with alpha, RGBA), bytes 24 and 25 of a PNG."""
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

PIL_MODES = {1: "L", 3: "RGB"}
"""Channels to which PIL converts everything."""
TURNED, FLIPPED_X, FLIPPED_Y = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)
"""Orientations of EXIF and TIFF that transpose, and then mirror, an image."""
MINISBLACK, RGB, SEPARATED, BITS_PER_SAMPLE, SAMPLES, ORIENTATION = 1, 2, 5, 258, 277, 274
"""Color spaces and tags of TIFF."""

# Too many pixels are refused below, in words; the others are about a file's metadata or palette, once per image.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
# It would write a line for each odd tag, of which a broken file has thousands.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class UnreadableImageError(ValueError):
    """An image that cannot be used; the message says why, in words for a person."""


class Decoder:
    """Stored image -> PIL image or tensor. Raises `UnreadableImageError` for what is broken or does not fit."""

    def __init__(self, config: DataConfig) -> None:
        value_range = config.value_range
        if value_range is not None and (len(value_range) != 2 or not -math.inf < value_range[0] < value_range[1]):
            raise UserError(
                f"data.value_range={value_range} is not a range; give the values of black and white, such as [0,65535]"
            )
        self.channels = config.channels
        self.value_range = value_range
        self.nan_value = config.nan_value
        self.apply_exif_rotation = config.apply_exif_rotation

    def pil(self, content: Content) -> Image.Image:
        """Image in RGB, or in L with one channel, as PIL decodes it."""
        if self.channels not in PIL_MODES:
            raise UnreadableImageError(f"PIL has no images of data.channels={self.channels} channels, only of 1 and 3")
        with _in_words():
            found = self._decoded(content)
            image = _as_image(found) if isinstance(found, np.ndarray) else found
            _check_not_one_pixel(image.width * image.height)
            return image

    def pixels(self, content: Content) -> Tensor:
        """Pixels (C, H, W) uint8, channels last in memory (but for turned photographs)."""
        with _in_words():
            if isinstance(content, bytes) and content.startswith(JPEG):
                pixels = self._jpeg(content)
                if pixels is not None:
                    _check_not_one_pixel(pixels[0].numel())
                    return pixels
            array = np.array(self._decoded(content))
            _check_not_one_pixel(array.shape[0] * array.shape[1])
            return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)

    def stored(self, content: Content) -> Image.Image | np.ndarray:
        """Values as they are stored: a PIL image of 8 bits, or an array (H, W) or (H, W, C) of any number type."""
        with _in_words():
            return self._opened(content)

    def _jpeg(self, content: bytes) -> Tensor | None:
        """None where PIL has to decide."""
        size, components = _jpeg_header(content)
        # PIL's gray of a color picture is not the luminance that a JPEG holds.
        if not 0 < size <= _most_pixels() or not (self.channels == 3 or self.channels == components == 1):
            return None
        mode = ImageReadMode.RGB if self.channels == 3 else ImageReadMode.GRAY
        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)  # the copy takes a microsecond
        try:
            decoded: Any = decode_jpeg(encoded, mode, apply_exif_orientation=self.apply_exif_rotation)
        except RuntimeError:
            return None
        return decoded

    def _decoded(self, content: Content) -> Image.Image | np.ndarray:
        """With as many channels as configured: an image in L or RGB, or an array (H, W, C) uint8."""
        found = self._opened(content)
        if isinstance(found, np.ndarray):
            array = self._in_8_bits(found)
            if array.shape[2] == self.channels:
                return array
            if not {array.shape[2], self.channels} <= set(PIL_MODES):
                self._refuse(array.shape[2], found)
            found = _as_image(array)
        if self.channels in PIL_MODES:
            return found.convert(PIL_MODES[self.channels])
        if found.mode in ("P", "PA"):
            found = found.convert("RGBA" if found.mode == "PA" or "transparency" in found.info else "RGB")
        if len(found.getbands()) != self.channels:
            self._refuse(len(found.getbands()), found)
        return np.asarray(found)

    def _in_8_bits(self, array: np.ndarray) -> np.ndarray:
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
            usual = "[0,1]" if array.dtype.kind == "f" else "[0,65535]"
            raise UnreadableImageError(f"{bits} image; set data.value_range, such as {usual}")
        array = self._finite(array) if array.dtype.kind == "f" else array
        low, high = self.value_range
        with np.errstate(over="ignore"):
            scaled = (array.astype(np.result_type(array.dtype, np.float32)) - low) * (255 / (high - low))
        return scaled.clip(0, 255).round().astype(np.uint8)

    def _finite(self, array: np.ndarray) -> np.ndarray:
        """The array with `data.nan_value` in the place of NaN and infinite values, or a refusal of it."""
        finite = np.isfinite(array)
        if finite.all():
            return array
        if self.nan_value is None:
            count = finite.size - int(finite.sum())
            raise UnreadableImageError(
                f"{count} of {finite.size} values are NaN or infinite; set data.nan_value to what they stand for"
            )
        return np.where(finite, array, np.asarray(self.nan_value, array.dtype))

    def _refuse(self, stored: int, found: Image.Image | np.ndarray) -> NoReturn:
        hint = ""
        if isinstance(found, np.ndarray) and found.ndim == 3 and found.shape[0] == self.channels:
            hint = f" (the shape is {found.shape}; expected (H, W, {self.channels}))"
        raise UnreadableImageError(f"{stored} channels are stored, but data.channels={self.channels}{hint}")

    def _opened(self, content: Content) -> Image.Image | np.ndarray:
        if isinstance(content, np.ndarray):
            return content
        if not content:
            raise UnreadableImageError("the file is empty")
        if content.startswith(NPY):
            return read_npy(content)
        if self.value_range is not None and content.startswith(PNG) and content[24:26] in DEEP_COLOR_PNG:
            # torchvision reads it in full, and takes the process with it where the file is broken.
            raise UnreadableImageError("16-bit color PNG, read in 8 bits: unset data.value_range or store TIFF")
        if content.startswith(TIFF):
            return self._tiff(content)
        image = self._with_pil(content)
        if content.startswith(PNG) and content[24:26] == DEEP_COLOR_PNG[1]:
            image = image.convert("LA")  # PIL makes RGBA of it
        return np.asarray(image) if _is_deep(image) else image

    def _with_pil(self, content: bytes) -> Image.Image:
        try:
            image = Image.open(io.BytesIO(content))
        except UnidentifiedImageError:
            raise UnreadableImageError(f"no image that PIL knows; the file begins with {content[:12]!r}") from None
        _check_size(image.width * image.height)
        return ImageOps.exif_transpose(image) if self.apply_exif_rotation else image

    def _tiff(self, content: bytes) -> Image.Image | np.ndarray:
        """PIL's image where it has all that is wanted of the file, else tifffile's array."""
        try:
            image: Any = self._with_pil(content)
        except UnreadableImageError:
            return self._with_tifffile(content)
        tags = getattr(image, "tag_v2", {})
        bits, samples = max(tags.get(BITS_PER_SAMPLE, (8,))), tags.get(SAMPLES, 1)
        cut = bits > 8 and not _is_deep(image)
        if self.channels in PIL_MODES and not _is_deep(image) and not (cut and self.value_range is not None):
            return image
        try:
            return self._with_tifffile(content)
        except (ValueError, ImportError):
            # PIL knows compressions for which tifffile needs the package imagecodecs.
            if cut or samples != len(image.getbands()):
                raise
            return np.asarray(image) if _is_deep(image) else image

    def _with_tifffile(self, content: bytes) -> np.ndarray:
        import tifffile  # not needed by most

        check_pages(content)
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            page: Any = file.pages[0]
            series = file.series[0]
            whole = page if self.channels in PIL_MODES or len(series.axes) > 3 else series
            _check_size(math.prod(whole.shape) // max(self.channels, 4))
            if page.photometric not in (MINISBLACK, RGB, SEPARATED):
                raise UnreadableImageError(f"TIFF of colors that are not read here (photometric {page.photometric})")
            array = self._channels_last(whole.asarray(), whole.axes)
            if self.channels in PIL_MODES and page.photometric == RGB:
                array = array[..., :3]
            elif self.channels in PIL_MODES and array.ndim == 3 and array.shape[2] == 2 and page.extrasamples[0] > 0:
                array = array[..., 0]  # the other one is alpha
            tag = page.tags.get(ORIENTATION)
            return _turned(array, orientation=1 if tag is None else int(tag.value))

    def _channels_last(self, array: np.ndarray, axes: str) -> np.ndarray:
        """(H, W) or (H, W, C), from tifffile's names of the axes."""
        others = [axis for axis in axes if axis not in "YX"]
        if len(others) != 1 or array.ndim != 3:
            return array
        # `imwrite` without options stores an array (H, W, C) as H pages (W, C), and does not know that any more.
        if others == ["Q"] and array.shape[0] != self.channels and array.shape[2] == self.channels:
            return array
        return np.moveaxis(array, axes.index(others[0]), -1)


@contextmanager
def _in_words() -> Iterator[None]:
    """Whatever a library raises on broken data becomes `UnreadableImageError`."""
    try:
        yield
    except (UserError, UnreadableImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        found = re.search(r"\((\d+) pixels", str(error))
        raise UnreadableImageError(_too_large(int(found[1])) if found else str(error)) from error
    except Exception as error:
        text = " ".join(str(error).split()) or "no reason given"
        known = isinstance(error, OSError)  # PIL's own words
        raise UnreadableImageError(text if known else f"broken file ({type(error).__name__}: {text})") from error


def _jpeg_header(content: bytes) -> tuple[int, int]:
    """Pixels and components; zeros where they do not stand where they should."""
    at = 2
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(content[at + 5 : at + 7]) * int.from_bytes(content[at + 7 : at + 9]), content[at + 9]
        at += 2 + int.from_bytes(content[at + 2 : at + 4])
    return 0, 0


def _most_pixels() -> float:
    return Image.MAX_IMAGE_PIXELS or math.inf


def _check_size(pixels: int) -> None:
    if pixels > _most_pixels():
        raise UnreadableImageError(_too_large(pixels))


def _check_not_one_pixel(pixels: int) -> None:
    if pixels < 2:
        raise UnreadableImageError("a single pixel, of which all crops are alike")


def _too_large(pixels: int) -> str:
    return f"{pixels / 1e6:.1f} megapixels; more than PIL's limit of {_most_pixels() / 1e6:.1f}"


def _is_deep(image: Image.Image) -> bool:
    """Whether it has values of more than 8 bits, which PIL's `convert` would cut off at 255."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _as_image(array_HWC: np.ndarray) -> Image.Image:
    """One or three channels of uint8."""
    return Image.fromarray(np.ascontiguousarray(array_HWC[..., 0] if array_HWC.shape[2] == 1 else array_HWC))


def _turned(array: np.ndarray, *, orientation: int) -> np.ndarray:
    """(H, W) or (H, W, C), as seen when the tag says `orientation`."""
    array = array.swapaxes(0, 1) if orientation in TURNED else array
    array = array[:, ::-1] if orientation in FLIPPED_X else array
    return array[::-1] if orientation in FLIPPED_Y else array
