"""Every kind of image: right, or refused in one sentence."""

import io
import random
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageFilter, ImageOps

from dino_lightning.config import FolderData
from dino_lightning.data.decode import Decoder, UnreadableImageError
from dino_lightning.errors import UserError

# The module sets them aside itself; pytest forgets that, and shows them again.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")

SIZE = (61, 43)
"""Width and height, odd and different, so that a swap or a padding shows."""


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
    """PIL writes inverted values and Adobe's marker, whose last byte says YCCK; without it, values are as they are."""
    content = encoded(photo("CMYK"), "JPEG", quality=95)
    at = content.index(b"Adobe")
    if kind == "ycck":
        return content[: at + 11] + b"\2" + content[at + 12 :]
    return content if kind == "adobe" else content[: at - 4] + content[at + 12 :]


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
    "loud jpeg": lambda: encoded(Image.fromarray(values(3)), "JPEG", quality=60),  # its luminance is not PIL's gray
    "gray jpeg": lambda: encoded(photo("L"), "JPEG"),
    "adobe cmyk jpeg": lambda: cmyk_jpeg("adobe"),
    "plain cmyk jpeg": lambda: cmyk_jpeg("plain"),
    "ycck jpeg": lambda: cmyk_jpeg("ycck"),
}
LIBRARIES_DIFFER = 2
"""In 1/255. torchvision's and PIL's wheels bring a libjpeg each; today they agree to the bit."""


def deep_png(channels: int) -> bytes:
    """16 bits, by hand: PIL writes only gray ones."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    array = values(channels, ">u2", 65536)
    rows = b"".join(b"\0" + row.tobytes() for row in array)
    header = struct.pack(">IIBBBBB", *SIZE, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", [*EXACT, *LOSSY])
def test_rgb_is_what_pil_converts_to(name: str) -> None:
    content = {**EXACT, **LOSSY}[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.array_equal(np.asarray(decoder().pil(content)), expected)
    pixels = decoder().pixels(content)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, SIZE[1], SIZE[0])
    assert pixels.stride()[0] == 1  # channels last
    difference = np.abs(as_hwc(pixels).astype(int) - expected).max()
    assert difference <= (LIBRARIES_DIFFER if name in LOSSY else 0)


@pytest.mark.parametrize("name", [name for name in [*EXACT, *LOSSY] if name != "lab tiff"])
def test_gray_is_what_pil_converts_to(name: str) -> None:
    content = {**EXACT, **LOSSY}[name]()
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
    image = decoder(channels=1).pil(content)
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), expected)
    pixels = decoder(channels=1).pixels(content)
    assert pixels.shape == (1, SIZE[1], SIZE[0])
    assert np.abs(as_hwc(pixels)[..., 0].astype(int) - expected).max() <= (LIBRARIES_DIFFER if name in LOSSY else 0)


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


@pytest.mark.parametrize("name", DEEP)
def test_deep_gray_follows_the_value_range(name: str) -> None:
    stored = values(1, np.uint16, 65536)
    stored[0, :3, 0] = 0, 1000, 65535
    content = DEEP[name](stored)
    expected = np.clip(np.round((stored[..., 0].astype(np.float64) - 1000) / 40000 * 255), 0, 255)
    ours = decoder(channels=1, value_range=[1000, 41000])
    assert np.array_equal(as_hwc(ours.pixels(content))[..., 0], expected)
    assert np.array_equal(np.asarray(ours.pil(content)), expected)
    assert np.array_equal(as_hwc(decoder(value_range=[1000, 41000]).pixels(content)), np.stack([expected] * 3, -1))


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("channels", [1, 3])
def test_deep_gray_without_a_range_is_refused(name: str, channels: int) -> None:
    content = DEEP[name](values(1, np.uint16, 65536))
    for method in ("pixels", "pil"):
        with pytest.raises(UnreadableImageError, match=r"image; set data\.value_range, such as \[0,"):
            getattr(decoder(channels=channels), method)(content)


def test_the_sentence_of_a_16_bit_image() -> None:
    with pytest.raises(UnreadableImageError) as caught:
        decoder().pixels(DEEP["png"](values(1, np.uint16, 65536)))
    assert str(caught.value) == "16-bit image; set data.value_range, such as [0,65535]"


def test_not_a_number_is_black_and_infinities_are_the_ends() -> None:
    array = np.array([[np.nan, -np.inf, np.inf, 0.5, 3e38]], np.float32)
    for content in (array, npy(array), tiff(array)):
        pixels = decoder(channels=1, value_range=[0.0, 1.0]).pixels(content)
        assert pixels.flatten().tolist() == [0, 0, 255, 128, 255]


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colour_png(channels: int) -> None:
    upper = values(channels, np.uint16, 65536) >> 8
    assert np.array_equal(as_hwc(decoder(channels=channels).pixels(deep_png(channels))), upper)
    with pytest.raises(UnreadableImageError, match="16-bit colour PNG, read in 8 bits: unset"):
        decoder(channels=channels, value_range=[0, 4095]).pixels(deep_png(channels))


@pytest.mark.parametrize("planar", [False, True])
def test_16_bit_colour_tiff_with_a_range_keeps_its_depth(planar: bool) -> None:
    stored = values(4, np.uint16, 65536)
    layout = {"planarconfig": "separate"} if planar else {}
    content = tiff(stored.transpose(2, 0, 1) if planar else stored, photometric="rgb", extrasamples=[2], **layout)
    scaled = np.round(stored / 65535 * 255)
    assert np.array_equal(as_hwc(decoder(channels=4, value_range=[0, 65535]).pixels(content)), scaled)
    assert np.array_equal(as_hwc(decoder(value_range=[0, 65535]).pixels(content)), scaled[..., :3])


def test_16_bit_colour_is_not_cut_behind_the_range() -> None:
    """PIL would try to give 8 bits of a TIFF that tifffile cannot read."""
    content = bytearray(tiff(values(3, np.uint16, 65536), photometric="rgb", compression="zlib"))
    at = content.index(struct.pack("<HHI", 259, 3, 1)) + 8
    content[at : at + 2] = struct.pack("<H", 5)  # LZW, which it is not
    with pytest.raises(UnreadableImageError, match="broken file"):
        decoder(value_range=[0, 65535]).pixels(bytes(content))


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


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_five_channels(name: str, dtype: Any) -> None:
    stored = values(5, dtype)
    content = MANY[name](stored)
    value_range = None if dtype == np.uint8 else [0, 255]
    pixels = decoder(channels=5, value_range=value_range).pixels(content)
    assert np.array_equal(as_hwc(pixels), stored)
    if value_range is not None:
        return
    with pytest.raises(UnreadableImageError, match=r"5 channels are stored, but data\.channels=4|43 .*channels=4"):
        decoder(channels=4).pixels(content)
    with pytest.raises(UnreadableImageError, match=r"PIL has no images of data\.channels=5"):
        decoder(channels=5).pil(content)


def test_two_and_four_channels() -> None:
    assert np.array_equal(as_hwc(decoder(channels=2).pixels(encoded(photo("LA")))), np.asarray(photo("LA")))
    assert np.array_equal(as_hwc(decoder(channels=4).pixels(encoded(photo("RGBA")))), np.asarray(photo("RGBA")))
    palette = Image.open(io.BytesIO(transparent_palette())).convert("RGBA")
    assert np.array_equal(as_hwc(decoder(channels=4).pixels(transparent_palette())), np.asarray(palette))
    for content in (
        tiff(values(4), photometric="rgb"),
        tiff(values(4), photometric="minisblack", planarconfig="contig"),
    ):
        assert np.array_equal(as_hwc(decoder(channels=4).pixels(content)), values(4))


@pytest.mark.parametrize(
    ("channels", "content", "stored"),
    [
        (4, lambda: encoded(photo()), 3),
        (4, lambda: encoded(photo(), "JPEG"), 3),
        (2, lambda: encoded(photo("L")), 1),
        (5, lambda: encoded(photo("RGBA")), 4),
        (3, lambda: values(4), 4),
        (3, lambda: npy(values(2)), 2),
        (1, lambda: values(5), 5),
    ],
)
def test_other_numbers_of_channels_are_refused(channels: int, content: Any, stored: int) -> None:
    with pytest.raises(UnreadableImageError) as caught:
        decoder(channels=channels).pixels(content())
    assert str(caught.value) == f"{stored} channels are stored, but data.channels={channels}"


def test_channels_in_front_get_a_hint() -> None:
    with pytest.raises(UnreadableImageError, match=r"the shape is \(5, 43, 61\); expected \(H, W, 5\)"):
        decoder(channels=5).pixels(values(5).transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_of_colours_and_grays(channels: int) -> None:
    mode = {1: "L", 3: "RGB"}[channels]
    for stored in (photo(), photo("L")):
        expected = np.asarray(stored.convert(mode)).reshape(SIZE[1], SIZE[0], channels)
        assert np.array_equal(as_hwc(decoder(channels=channels).pixels(np.asarray(stored))), expected)
        assert np.array_equal(np.asarray(decoder(channels=channels).pil(np.asarray(stored))), expected.squeeze())
    mask = values(1)[..., 0] > 100
    assert np.array_equal(as_hwc(decoder(channels=1).pixels(mask))[..., 0], mask * 255)


def test_pixels_are_a_copy() -> None:
    kept = np.zeros((4, 4, 3), np.uint8)
    kept.flags.writeable = False  # as in a memory-mapped cache
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder().pixels(kept).fill_(9)
    assert not kept.any()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    content = encoded(photo(), form, exif=exif)
    as_stored = Image.open(io.BytesIO(content))
    turned = np.asarray(ImageOps.exif_transpose(as_stored).convert("RGB")).astype(int)
    for rotate, expected in ((False, np.asarray(as_stored.convert("RGB")).astype(int)), (True, turned)):
        ours = decoder(apply_exif_rotation=rotate)
        assert np.array_equal(np.asarray(ours.pil(content)), expected)
        pixels = as_hwc(ours.pixels(content))
        assert pixels.shape == expected.shape
        assert np.abs(pixels - expected).max() <= (LIBRARIES_DIFFER if form == "JPEG" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_whoever_reads_it(orientation: int) -> None:
    extra = [(274, "H", 1, orientation, True)]
    by_pil = as_hwc(decoder().pixels(tiff(values(3), photometric="rgb", extratags=extra)))
    five = np.concatenate([values(3), values(2)], axis=-1)
    options = {"photometric": "minisblack", "planarconfig": "contig", "extratags": extra}
    assert np.array_equal(as_hwc(decoder(channels=5).pixels(tiff(five, **options)))[..., :3], by_pil)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_truncated_jpegs_are_refused_as_by_pil(options: dict[str, Any]) -> None:
    content = encoded(photo().resize((200, 150)), "JPEG", quality=90, **options)
    for end in (*(int(len(content) * share) for share in (0.3, 0.6, 0.95)), len(content) - 3, len(content) - 1):
        with pytest.raises(OSError, match="[Tt]runcated"):
            Image.open(io.BytesIO(content[:end])).load()
        for method in ("pixels", "pil"):
            with pytest.raises(UnreadableImageError, match="[Tt]runcated"):
                getattr(decoder(), method)(content[:end])
    assert decoder().pixels(content + b"more").shape == (3, 150, 200)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"<html>not here</html>", "no image that PIL knows; the file begins with b'<html>not he'"),
        (b"\xff\xd8\xff", "no image that PIL knows"),
        (b"\x89PNG\r\n\x1a\n", "no image that PIL knows"),
        (b"II*\0", "broken file"),
        (b"\x93NUMPY\x01\x00", "broken file"),
        (npy(np.array([{}], dtype=object)), "allow_pickle"),
        (npy(np.zeros((2, 2), np.complex64)), "array of complex64; expected numbers"),
        (npy(np.zeros((0, 4, 3), np.uint8)), "array of shape"),
        (npy(np.zeros((2, 2, 2, 2), np.uint8)), "array of shape"),
    ],
)
def test_no_images(content: bytes, words: str) -> None:
    for method in ("pixels", "pil"):
        with pytest.raises(UnreadableImageError, match=words) as caught:
            getattr(decoder(), method)(content)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factor", [1.5, 3])
@pytest.mark.parametrize("name", ["jpeg", "rgb", "tiff", "five"])
def test_too_many_pixels(name: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL warns above its limit and raises above twice of it; here both are one sentence, for every format."""
    content = MANY["planar tiff"](values(5)) if name == "five" else {**EXACT, **LOSSY}[name]()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(SIZE[0] * SIZE[1] / factor))
    settings = {"channels": 5} if name == "five" else {}
    with pytest.raises(UnreadableImageError, match=r"0\.0 megapixels; more than PIL's limit of 0\.0"):
        decoder(**settings).pixels(content)


@pytest.mark.parametrize("value_range", [[1.0], [5, 5], [float("nan"), 1], [2, 1]])
def test_wrong_ranges(value_range: list[float]) -> None:
    with pytest.raises(UserError, match=r"data\.value_range=.* is not a range"):
        decoder(value_range=value_range)


def test_whatever_is_broken_is_refused_in_words(capfd: pytest.CaptureFixture[str]) -> None:
    """Truncations and flipped bytes of every kind: pixels of the right form, or `UnreadableImageError`."""
    dice = random.Random(0)
    contents = [make() for make in (*EXACT.values(), *LOSSY.values())]
    contents += [make(values(1, np.uint16, 65536)) for name, make in DEEP.items() if name != "array"]
    contents += [make(values(5)) for name, make in MANY.items() if name != "array"]
    decoders = [decoder(), decoder(channels=1, value_range=[0, 65535]), decoder(channels=5, apply_exif_rotation=True)]
    outcomes = {"read": 0, "refused": 0}
    for content in contents:
        broken = [content[: dice.randrange(len(content))] for _ in range(4)]
        for flips in (1, 3, 20):
            changed = bytearray(content)
            for _ in range(flips):  # most of them where the structure is
                at = dice.randrange(len(changed) if dice.random() < 0.3 else min(len(changed), 200))
                changed[at] = dice.randrange(256)
            broken.append(bytes(changed))
        for some, ours in ((some, ours) for some in broken for ours in decoders):
            try:
                pixels = ours.pixels(some)
            except UnreadableImageError:
                outcomes["refused"] += 1
            else:
                outcomes["read"] += 1
                assert pixels.dtype == torch.uint8
                assert pixels.shape[0] == ours.channels
    capfd.readouterr()  # libjpeg and libtiff complain
    assert min(outcomes.values()) > 50
