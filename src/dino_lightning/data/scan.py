"""Inspects every image of a source in parallel: format, size, readability, and statistics of the values."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dino_lightning.config import DataConfig
from dino_lightning.data.bad_images import UNREADABLE, why_unreadable
from dino_lightning.data.decode import BITS_PER_SAMPLE, JPEG, NPY, ORIENTATION, PNG, TIFF, Decoder
from dino_lightning.data.parallel import process_chunks
from dino_lightning.data.sources.base import Content, ImageSource, Subset

MODES = {"1": "black and white", "L": "gray", "LA": "gray with alpha", "P": "palette", "PA": "palette with alpha"}
"""Descriptions of PIL's modes; other modes describe themselves."""

Range = tuple[float, float]
"""Smallest and largest value."""


class Moments(NamedTuple):
    """Statistics of each channel over all pixels, for values from 0 to 1."""

    mean: list[float]
    std: list[float]
    images: int
    unreadable: int


@dataclass
class ScanResult:
    """The properties of n images of a source."""

    hashes: np.ndarray
    """Hash of the content (n,) uint64."""
    sizes: np.ndarray
    """Height and width (n, 2), after a rotation that is applied; zeros for an unreadable image."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Description of format and colors -> number of images."""
    rotated: int = 0
    """Images with an EXIF tag that requires a rotation."""
    value_ranges: dict[str, Range] = field(default_factory=dict)
    """Number type with more than 8 bits -> range of its values."""
    unreadable: dict[int, str] = field(default_factory=dict)
    """Index of an unreadable image -> reason."""

    @classmethod
    def empty(cls, images: int) -> "ScanResult":
        """The result before any image was inspected."""
        return cls(np.zeros(images, np.uint64), np.zeros((images, 2), np.int32))

    @property
    def readable(self) -> np.ndarray:
        """Mask (n,)."""
        return self.sizes[:, 0] > 0

    def add_range(self, dtype: str, values: Range) -> None:
        """Extend the range of a number type."""
        self.value_ranges[dtype] = merge_ranges([values, self.value_ranges.get(dtype, values)])

    def add(self, images: range, part: "ScanResult") -> None:
        """Add the result of some images."""
        self.hashes[images], self.sizes[images] = part.hashes, part.sizes
        self.kinds.update(part.kinds)
        self.rotated += part.rotated
        self.unreadable.update({images[i]: reason for i, reason in part.unreadable.items()})
        for dtype, values in part.value_ranges.items():
            self.add_range(dtype, values)


class ImageScanner:
    """Positions in the source -> the result of these images."""

    def __init__(self, source: ImageSource, *, config: DataConfig) -> None:
        self.source, self.decoder = source, Decoder(config)
        self.stored_decoder = Decoder(replace(config, apply_exif_rotation=False, value_range=None))

    def __call__(self, images: range) -> ScanResult:
        """The result; its indices count from the first of the images."""
        result = ScanResult.empty(len(images))
        for i, index in enumerate(images):
            try:
                content = self.source.read(index)
                result.hashes[i] = content_hash(content)
                self._add_kind(content, result)
                result.sizes[i] = self.decoder.pixels(content).shape[1:]
            except UNREADABLE as error:
                result.unreadable[i] = why_unreadable(error)
        return result

    def _add_kind(self, content: Content, result: ScanResult) -> None:
        stored = self.stored_decoder.stored(content)
        result.kinds[kind(content, stored)] += 1
        if isinstance(stored, Image.Image):
            result.rotated += orientation(stored) != 1
        elif stored.dtype.itemsize > 1 and stored.dtype.kind in "uif" and np.isfinite(stored).any():
            finite = stored[np.isfinite(stored)]
            result.add_range(str(stored.dtype.newbyteorder("=")), (float(finite.min()), float(finite.max())))


def scan(
    source: ImageSource, *, config: DataConfig, workers: int, title: str, on_unreadable: Callable[[int, str], Any]
) -> ScanResult:
    """Inspect all images, with a progress bar; `on_unreadable` is called with index and reason of unreadable images."""
    result = ScanResult.empty(len(source))
    scanner = ImageScanner(source, config=config)
    for images, part in process_chunks(scanner, len(source), workers=workers, title=title):
        result.add(images, part)
        for i, reason in part.unreadable.items():
            on_unreadable(images[i], reason)
    return result


class ChannelSums:
    """Positions in the source -> pixels, (sum, sum of squares) (2, C) of values from 0 to 255, unreadable images."""

    def __init__(self, source: ImageSource, *, config: DataConfig) -> None:
        self.source, self.channels, self.decoder = source, config.channels, Decoder(config)

    def __call__(self, images: range) -> tuple[int, np.ndarray, int]:
        """The sums of these images."""
        sums, count, unreadable = np.zeros((2, self.channels), np.int64), 0, 0
        for index in images:
            try:
                pixels = self.decoder.pixels(self.source.read(index)).flatten(1).numpy()
            except UNREADABLE as error:
                why_unreadable(error)
                unreadable += 1
                continue
            count += pixels.shape[1]
            sums += pixels.sum(1, dtype=np.int64), (pixels.astype(np.uint16) ** 2).sum(1, dtype=np.int64)
        return count, sums, unreadable


def moments(source: ImageSource, indices: np.ndarray, *, config: DataConfig, workers: int) -> Moments | None:
    """Mean and standard deviation of the images `indices`, from exact sums; None if none of them is readable."""
    pixels, unreadable, sums = 0, 0, np.zeros((2, config.channels), np.int64)
    work = ChannelSums(Subset(source, indices=indices), config=config)
    for _, (count, part, failed) in process_chunks(work, len(indices), workers=workers, title="reading"):
        pixels, unreadable, sums = pixels + count, unreadable + failed, sums + part
    if not pixels:
        return None
    totals, squares = sums.tolist()  # Python's integers do not overflow
    variances = [(pixels * square - total**2) / pixels**2 for total, square in zip(totals, squares, strict=True)]
    mean: list[float] = [total / pixels / 255 for total in totals]
    std = [math.sqrt(variance) / 255 for variance in variances]
    return Moments(mean, std, len(indices) - unreadable, unreadable)


def duplicates(scan: ScanResult) -> tuple[int, list[tuple[int, int]]]:
    """Number of readable images that are copies of an earlier one, and up to three examples (copy, original)."""
    indices = np.flatnonzero(scan.readable)
    order = indices[np.argsort(scan.hashes[indices], kind="stable")]
    hashes = scan.hashes[order]
    copies = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1
    return len(copies), [(int(order[copy]), int(order[copy - 1])) for copy in copies[:3]]


def shared_images(train: ScanResult, val: ScanResult) -> tuple[int, list[tuple[int, int]]]:
    """Number of readable images of `val` that are also in `train`, and up to three examples (val, train)."""
    bank, queries = (np.flatnonzero(part.readable) for part in (train, val))
    order = bank[np.argsort(train.hashes[bank], kind="stable")]
    if not len(order):
        return 0, []
    hashes = train.hashes[order]
    matches = np.searchsorted(hashes, val.hashes[queries]).clip(max=len(hashes) - 1)
    same = np.flatnonzero(hashes[matches] == val.hashes[queries])
    return len(same), [(int(queries[query]), int(order[matches[query]])) for query in same[:3]]


def content_hash(content: Content) -> int:
    """A hash with 64 bits: among ten million different images, a collision has a probability of 1 in 400,000."""
    digest = hashlib.blake2b(content if isinstance(content, bytes) else content.tobytes(), digest_size=8)
    if isinstance(content, np.ndarray):
        digest.update(f"{content.shape} {content.dtype}".encode())
    return int.from_bytes(digest.digest())


def kind(content: Content, stored: Image.Image | np.ndarray) -> str:
    """A description of format, colors and number type."""
    if isinstance(content, np.ndarray):
        form = "array"
    else:
        magics = {"JPEG": JPEG, "PNG": PNG, "TIFF": TIFF, "npy": NPY}
        by_magic = next((name for name, magic in magics.items() if content.startswith(magic)), "")
        form = by_magic or getattr(stored, "format", None) or "other"
    if isinstance(stored, np.ndarray):
        channels = stored.shape[2] if stored.ndim == 3 else 1
        return f"{form} {channels} channel{'s' * (channels != 1)} {stored.dtype.newbyteorder('=')}"
    bits = max(getattr(stored, "tag_v2", {}).get(BITS_PER_SAMPLE, (8,)))
    deep = bits > 8 or (form == "PNG" and isinstance(content, bytes) and content[24] == 16)
    return f"{form} {MODES.get(stored.mode, stored.mode)}{' (16 bits, read as 8)' if deep else ''}"


def orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) if it is missing or invalid."""
    try:
        number = image.getexif().get(ORIENTATION, 1)
    except Exception:  # PIL raises many kinds of errors for broken EXIF data, which does not affect the pixels
        return 1
    return number if number in range(2, 9) else 1


def merge_ranges(ranges: list[Range]) -> Range:
    """The smallest range that contains all ranges."""
    return min(low for low, _ in ranges), max(high for _, high in ranges)
