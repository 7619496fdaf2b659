"""Every kind of image: right, or refused in one sentence."""

import io
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from decode_cases import (
    DEEP,
    EXACT,
    LOSSY,
    MANY,
    SIZE,
    as_hwc,
    decoder,
    encoded,
    npy,
    photo,
    tiff,
    values,
)
from PIL import Image, ImageOps

from dino_lightning.data.decode import UnreadableImageError

# The module sets them aside itself; pytest forgets that, and shows them again.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


LIBRARIES_DIFFER = 2
"""In 1/255. torchvision's and PIL's wheels bring a libjpeg each; today they agree to the bit."""


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
def test_a_tiff_is_rotated_by_every_decoder(orientation: int) -> None:
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
        (b"<html>not here</html>", "not an image format that PIL supports; the file begins with b'<html>not he'"),
        (b"\xff\xd8\xff", "not an image format that PIL supports"),
        (b"\x89PNG\r\n\x1a\n", "not an image format that PIL supports"),
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
    with pytest.raises(UnreadableImageError, match=r"0\.0 megapixels; PIL's limit is 0\.0"):
        decoder(**settings).pixels(content)


def test_broken_files_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
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
