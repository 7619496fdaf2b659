"""Images of more than 8 bits and of other numbers of channels."""

import io
import struct
from typing import Any

import numpy as np
import pytest
from decode_cases import (
    DEEP,
    MANY,
    SIZE,
    as_hwc,
    decoder,
    deep_png,
    encoded,
    npy,
    photo,
    tiff,
    transparent_palette,
    values,
)
from PIL import Image

from dino_lightning.data.decode import UnreadableImageError

# The module sets them aside itself; pytest forgets that, and shows them again.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


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


@pytest.mark.parametrize(("nan_value", "level"), [(0.0, 0), (1.0, 255), (0.2, 51)])
def test_nan_becomes_the_configured_value(nan_value: float, level: int) -> None:
    array = np.array([[np.nan, -np.inf, np.inf, 0.5, 3e38, -3e38]], np.float32)
    for content in (array, npy(array), tiff(array)):
        pixels = decoder(channels=1, value_range=[0.0, 1.0], nan_value=nan_value).pixels(content)
        assert pixels.flatten().tolist() == [level, level, level, 128, 255, 0]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_image_with_nan_is_refused(wrong: float, dtype: type) -> None:
    array = np.full((3, 4), 0.5, dtype)
    array[1, 2] = wrong
    for content in (array, npy(array), tiff(array)):
        with pytest.raises(UnreadableImageError, match="^1 of 12 values are NaN or infinite; set data.nan_value"):
            decoder(channels=1, value_range=[0.0, 1.0]).pixels(content)


def test_a_single_pixel_is_refused() -> None:
    for form in ("PNG", "JPEG", "TIFF"):
        for read in (decoder().pil, decoder().pixels):
            with pytest.raises(UnreadableImageError, match="a single pixel"):
                read(encoded(photo().resize((1, 1)), form))
            read(encoded(photo().resize((2, 1)), form))


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_color_png(channels: int) -> None:
    upper = values(channels, np.uint16, 65536) >> 8
    assert np.array_equal(as_hwc(decoder(channels=channels).pixels(deep_png(channels))), upper)
    with pytest.raises(UnreadableImageError, match="16-bit color PNG can only be read with 8 bits; unset"):
        decoder(channels=channels, value_range=[0, 4095]).pixels(deep_png(channels))


@pytest.mark.parametrize("planar", [False, True])
def test_16_bit_color_tiff_with_a_range_keeps_its_depth(planar: bool) -> None:
    stored = values(4, np.uint16, 65536)
    layout = {"planarconfig": "separate"} if planar else {}
    content = tiff(stored.transpose(2, 0, 1) if planar else stored, photometric="rgb", extrasamples=[2], **layout)
    scaled = np.round(stored / 65535 * 255)
    assert np.array_equal(as_hwc(decoder(channels=4, value_range=[0, 65535]).pixels(content)), scaled)
    assert np.array_equal(as_hwc(decoder(value_range=[0, 65535]).pixels(content)), scaled[..., :3])


def test_16_bit_color_is_not_clipped_after_the_range() -> None:
    """PIL would try to give 8 bits of a TIFF that tifffile cannot read."""
    content = bytearray(tiff(values(3, np.uint16, 65536), photometric="rgb", compression="zlib"))
    at = content.index(struct.pack("<HHI", 259, 3, 1)) + 8
    content[at : at + 2] = struct.pack("<H", 5)  # LZW, which it is not
    with pytest.raises(UnreadableImageError, match="broken file"):
        decoder(value_range=[0, 65535]).pixels(bytes(content))


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
    with pytest.raises(UnreadableImageError, match=r"the image has 5 channels, but data\.channels=4|43 .*channels=4"):
        decoder(channels=4).pixels(content)
    with pytest.raises(UnreadableImageError, match=r"PIL supports only 1 and 3 channels, not data\.channels=5"):
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
    assert str(caught.value) == f"the image has {stored} channels, but data.channels={channels}"


def test_channels_in_front_get_a_hint() -> None:
    with pytest.raises(UnreadableImageError, match=r"the shape is \(5, 43, 61\); expected \(H, W, 5\)"):
        decoder(channels=5).pixels(values(5).transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_of_colors_and_grays(channels: int) -> None:
    mode = {1: "L", 3: "RGB"}[channels]
    for stored in (photo(), photo("L")):
        expected = np.asarray(stored.convert(mode)).reshape(SIZE[1], SIZE[0], channels)
        assert np.array_equal(as_hwc(decoder(channels=channels).pixels(np.asarray(stored))), expected)
        assert np.array_equal(np.asarray(decoder(channels=channels).pil(np.asarray(stored))), expected.squeeze())
    mask = values(1)[..., 0] > 100
    assert np.array_equal(as_hwc(decoder(channels=1).pixels(mask))[..., 0], mask * 255)
