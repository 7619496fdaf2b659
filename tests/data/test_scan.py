"""Scans of a data set against slow loops over the same images."""

import io
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_lightning.config import FolderData
from dino_lightning.data.parallel import CHUNK
from dino_lightning.data.scan import ScanResult, content_hash, duplicates, kind, moments, scan, shared_images
from dino_lightning.data.sources.base import Content


class Listed:
    """A source of given contents; `None` is a missing file."""

    classes: list[str] | None = None
    labels: np.ndarray | None = None

    def __init__(self, contents: list[Content | None]) -> None:
        self.contents = contents

    def __len__(self) -> int:
        return len(self.contents)

    def read(self, index: int) -> Content:
        content = self.contents[index]
        if content is None:
            raise FileNotFoundError("no such file")
        return content

    def describe(self, index: int) -> str:
        return f"image {index}"

    def fingerprint(self) -> str:
        return ""


def encoded(array: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, form, **options)
    return file.getvalue()


def colors(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mixed(count: int) -> list[Content | None]:
    sizes = np.random.default_rng(1).integers(1, 40, (count, 2)).tolist()
    return [encoded(colors(i, height, width)) for i, (height, width) in enumerate(sizes)]


def scanned(contents: list[Content | None], *, workers: int = 0, **settings: Any) -> tuple[ScanResult, dict[int, str]]:
    bad: dict[int, str] = {}
    config = FolderData(path="", **settings)
    whole = scan(Listed(contents), config=config, workers=workers, title="train", on_unreadable=bad.__setitem__)
    return whole, bad


@pytest.mark.parametrize("workers", [0, 2])
def test_sizes_and_unreadable_images(workers: int) -> None:
    contents = mixed(2 * CHUNK + 5)
    contents[3], contents[CHUNK], contents[-1] = b"", None, contents[7][:-30]  # type: ignore[index]
    whole, bad = scanned(contents, workers=workers)
    assert sorted(bad) == [3, CHUNK, len(contents) - 1]
    assert bad[3] == "the file is empty"
    assert "no such file" in bad[CHUNK]
    for index, content in enumerate(contents):
        expected = (0, 0) if index in bad else Image.open(io.BytesIO(content)).size[::-1]  # type: ignore[arg-type]
        assert tuple(whole.sizes[index]) == expected
    assert whole.readable.sum() == len(contents) - 3


def test_kinds_rotations_and_deep_values() -> None:
    exif = Image.Exif()
    exif[274] = 6
    deep = np.array([[7, 300], [65000, 9]], np.uint16)
    floats = np.array([[np.nan, -0.5], [np.inf, 2.0]], np.float32)
    file = io.BytesIO()
    np.save(file, floats)
    contents: list[Content | None] = [
        encoded(colors(0, 8, 4), "JPEG", exif=exif),
        encoded(colors(0, 8, 4), "JPEG"),
        encoded(colors(0, 8, 4)[..., 0]),
        encoded(deep),
        encoded(deep + 5),
        file.getvalue(),
        colors(0, 8, 4),
    ]
    whole, bad = scanned(contents, apply_exif_rotation=True)
    assert whole.kinds == Counter(
        {
            "JPEG RGB": 2,
            "PNG gray": 1,
            "PNG 1 channel uint16": 2,
            "npy 1 channel float32": 1,
            "array 3 channels uint8": 1,
        }
    )
    assert whole.rotated == 1
    assert whole.sizes[:2].tolist() == [[4, 8], [8, 4]]  # as it is used: the first one turned
    assert whole.value_ranges == {"uint16": (7.0, 65005.0), "float32": (-0.5, 2.0)}
    assert sorted(bad) == [3, 4, 5]
    assert list(scanned(contents, value_range=[0.0, 65535.0])[1]) == [5]  # NaN and infinite
    assert scanned(contents, value_range=[0.0, 65535.0], nan_value=0.0)[1] == {}


def test_kind_names_what_pil_reduces() -> None:
    import tifffile

    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((4, 4, 3), np.uint16), photometric="rgb")
    content = file.getvalue()
    assert kind(content, Image.open(io.BytesIO(content))) == "TIFF RGB (16 bits, read as 8)"


def test_duplicates_are_found_within_and_between() -> None:
    a, b, c, d = (encoded(colors(i, 5, 5)) for i in range(4))
    train, _ = scanned([a, b, a, c, a, b"", b""])
    assert duplicates(train) == (2, [(2, 0), (4, 2)])
    val, _ = scanned([d, c, b, b"", d])
    assert shared_images(train, val) == (2, [(1, 3), (2, 1)])
    assert shared_images(scanned([b""])[0], val) == (0, [])
    assert duplicates(scanned([a])[0]) == (0, [])


def test_arrays_of_the_same_bytes_differ_by_shape_and_type() -> None:
    array = np.zeros((4, 4), np.uint8)
    others = [array.reshape(2, 8), array.view(np.int8), array.tobytes()]
    assert content_hash(array) == content_hash(array.copy())
    assert len({content_hash(content) for content in (array, *others)}) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_moments_are_those_of_all_pixels(workers: int) -> None:
    contents = mixed(CHUNK + 9)
    contents[4] = b"broken"
    indices = np.arange(1, len(contents))
    found = moments(Listed(contents), indices, config=FolderData(path=""), workers=workers)
    assert found is not None
    pixels = [np.asarray(Image.open(io.BytesIO(contents[i]))).reshape(-1, 3) for i in indices if i != 4]  # type: ignore[arg-type]
    values = np.concatenate(pixels).astype(np.float64) / 255
    np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.std, values.std(0), rtol=1e-12)
    assert (found.images, found.unreadable) == (len(indices) - 1, 1)


def test_moments_of_other_channels_and_of_nothing() -> None:
    arrays: list[Content | None] = [np.full((3, 4, 5), 51, np.uint8), np.full((1, 2, 5), 204, np.uint8)]
    found = moments(Listed(arrays), np.arange(2), config=FolderData(path="", channels=5), workers=0)
    assert found is not None
    values = np.array([51] * 12 + [204] * 2) / 255
    np.testing.assert_allclose(found.mean, [values.mean()] * 5, rtol=1e-12)
    np.testing.assert_allclose(found.std, [values.std()] * 5, rtol=1e-12)
    assert moments(Listed([b""]), np.arange(1), config=FolderData(path=""), workers=0) is None
