"""Images in all supported formats, for the tests of decoding."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import tifffile
import torch
from PIL import Image, ImageFilter

from dino_lightning.config import FolderData
from dino_lightning.data.decode import Decoder

SIZE = (61, 43)
"""(width, height), odd and different, so that swapped sides and padding are detected."""


def decoder(**settings: Any) -> Decoder:
    return Decoder(FolderData(path="", **settings))


def photo(mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(3).integers(0, 256, (SIZE[1], SIZE[0], 4), dtype=np.uint8)
    smooth = Image.fromarray(values, "RGBA").filter(ImageFilter.GaussianBlur(2))
    smooth.putalpha(Image.fromarray(values[..., 3]))
    return smooth if mode == "RGBA" else smooth.convert(mode)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def tiff(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def values(channels: int, dtype: Any = np.uint8, high: int = 256) -> np.ndarray:
    return np.random.default_rng(4).integers(0, high, (SIZE[1], SIZE[0], channels)).astype(dtype)


def as_hwc(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(1, 2, 0).numpy()


def transparent_palette() -> bytes:
    return encoded(photo().quantize(16), transparency=bytes(range(0, 160, 10)))


def cmyk_jpeg(kind: str) -> bytes:
    """A CMYK JPEG of one `kind`. PIL writes inverted values and Adobe's marker, whose last byte selects YCCK.

    Without the marker, values are not inverted.
    """
    content = encoded(photo("CMYK"), "JPEG", quality=95)
    at = content.index(b"Adobe")
    if kind == "ycck":
        return content[: at + 11] + b"\2" + content[at + 12 :]
    return content if kind == "adobe" else content[: at - 4] + content[at + 12 :]


def deep_png(channels: int) -> bytes:
    """A 16-bit PNG written without PIL, which writes only gray ones."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    array = values(channels, ">u2", 65536)
    rows = b"".join(b"\0" + row.tobytes() for row in array)
    header = struct.pack(">IIBBBBB", *SIZE, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


EXACT = {
    "gray": lambda: encoded(photo("L")),
    "gray+alpha": lambda: encoded(photo("LA")),
    "palette": lambda: encoded(photo().quantize(16)),
    "palette with transparency": transparent_palette,
    "rgb": lambda: encoded(photo()),
    "rgba": lambda: encoded(photo("RGBA")),
    "1-bit": lambda: encoded(photo("1")),
    "16-bit rgb png": lambda: deep_png(3),
    "gif": lambda: encoded(photo(), "GIF"),
    "animated gif": lambda: encoded(photo(), "GIF", save_all=True, append_images=[photo().rotate(90)]),
    "webp": lambda: encoded(photo("RGBA"), "WEBP", lossless=True),
    "bmp": lambda: encoded(photo(), "BMP"),
    "tiff": lambda: encoded(photo(), "TIFF"),
    "lzw tiff": lambda: encoded(photo(), "TIFF", compression="tiff_lzw"),
    "jpeg in tiff": lambda: encoded(photo(), "TIFF", compression="jpeg"),
    "cmyk tiff": lambda: encoded(photo("CMYK"), "TIFF"),
    "lab tiff": lambda: encoded(Image.fromarray(values(3), "LAB"), "TIFF"),
    "16-bit rgb tiff": lambda: tiff(values(3, np.uint16, 65536), photometric="rgb"),
    "planar tiff": lambda: tiff(values(3).transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
}
LOSSY = {
    "jpeg": lambda: encoded(photo(), "JPEG"),
    "progressive jpeg": lambda: encoded(photo(), "JPEG", progressive=True, subsampling=1),
    "loud jpeg": lambda: encoded(
        Image.fromarray(values(3)), "JPEG", quality=60
    ),  # its luminance differs from PIL's gray
    "gray jpeg": lambda: encoded(photo("L"), "JPEG"),
    "adobe cmyk jpeg": lambda: cmyk_jpeg("adobe"),
    "plain cmyk jpeg": lambda: cmyk_jpeg("plain"),
    "ycck jpeg": lambda: cmyk_jpeg("ycck"),
}

DEEP = {
    "png": lambda v: encoded(Image.fromarray(v[..., 0].astype(np.uint16))),
    "tiff": lambda v: tiff(v[..., 0].astype(np.uint16)),
    "big-endian tiff": lambda v: tiff(v[..., 0].astype(np.uint16), byteorder=">"),
    "deflated tiff": lambda v: tiff(v[..., 0].astype(np.uint16), compression="zlib"),
    "lzw tiff": lambda v: encoded(Image.fromarray(v[..., 0].astype(np.uint16)), "TIFF", compression="tiff_lzw"),
    "signed tiff": lambda v: tiff(v[..., 0].astype(np.int32)),
    "float tiff": lambda v: tiff(v[..., 0].astype(np.float32)),
    "double tiff": lambda v: tiff(v[..., 0].astype(np.float64)),
    "pgm": lambda v: encoded(Image.fromarray(v[..., 0].astype(np.uint16)), "PPM"),
    "npy": lambda v: npy(v[..., 0].astype(np.uint16)),
    "array": lambda v: v[..., 0].astype(np.uint16),
}
MANY = {
    "npy": npy,
    "array": lambda v: v,
    "interleaved tiff": lambda v: tiff(v, photometric="minisblack", planarconfig="contig"),
    "planar tiff": lambda v: tiff(v.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate"),
    "tiff of pages": lambda v: tiff(v.transpose(2, 0, 1), photometric="minisblack"),
    "tiff of rows": lambda v: tiff(v, photometric="minisblack"),
    "rgb tiff with more": lambda v: tiff(v, photometric="rgb"),
    "imagej tiff": lambda v: tiff(v.transpose(2, 0, 1), imagej=True),
}
