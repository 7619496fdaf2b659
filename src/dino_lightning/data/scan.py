"""Looking at every image of a source in parallel: what it is, whether it can be read, and the moments of its values."""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dino_lightning.config import DataConfig
from dino_lightning.data.bad_images import UNREADABLE, why_unreadable
from dino_lightning.data.cache_build import progress_bar
from dino_lightning.data.decode import BITS_PER_SAMPLE, JPEG, NPY, ORIENTATION, PNG, TIFF, Decoder
from dino_lightning.data.sources.base import Content, ImageSource

CHUNK = 32
"""Images that a process looks at before it reports."""
MODES = {"1": "black and white", "L": "gray", "LA": "gray with alpha", "P": "palette", "PA": "palette with alpha"}
"""PIL's modes in words; the others are words."""


class Moments(NamedTuple):
    """Of each channel over all pixels, of values in 0 to 1."""

    mean: list[float]
    std: list[float]
    images: int
    unreadable: int


class ChunkScan(NamedTuple):
    """What a process found in m images of one source."""

    start: int
    """Index of the first."""
    hashes: np.ndarray
    """Of the content (m,) uint64."""
    sizes: np.ndarray
    """Height and width (m, 2); zeros for an unreadable image."""
    kinds: Counter[str]
    turned: int
    deep: dict[str, tuple[float, float]]
    unreadable: list[tuple[int, str]]
    """Index and reason."""


@dataclass
class ScanResult:
    """What was found in the n images of a source."""

    hashes: np.ndarray
    """Of the content (n,) uint64."""
    sizes: np.ndarray
    """Height and width (n, 2) as they are used; zeros for an unreadable image."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Format and colors, in words -> images."""
    turned: int = 0
    """Images with an EXIF tag that asks for a rotation."""
    deep: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Number type of more than 8 bits -> smallest and largest value."""

    @property
    def readable(self) -> np.ndarray:
        """Mask (n,)."""
        return self.sizes[:, 0] > 0

    def add(self, looked: ChunkScan) -> None:
        """Take in a part."""
        place = slice(looked.start, looked.start + len(looked.hashes))
        self.hashes[place], self.sizes[place] = looked.hashes, looked.sizes
        self.kinds.update(looked.kinds)
        self.turned += looked.turned
        for name, span in looked.deep.items():
            self.deep[name] = joined(self.deep.get(name, span), span)


class ScanDataset(Dataset[ChunkScan]):
    """Item k: what the images of chunk k are."""

    def __init__(self, source: ImageSource, *, config: DataConfig) -> None:
        self.source, self.images = source, len(source)
        self.decoder = Decoder(config)
        self.plain = Decoder(replace(config, apply_exif_rotation=False, value_range=None))

    def __len__(self) -> int:
        return -(-self.images // CHUNK)

    def __getitem__(self, number: int) -> ChunkScan:
        start = number * CHUNK
        count = min(CHUNK, self.images - start)
        found = ChunkScan(start, np.zeros(count, np.uint64), np.zeros((count, 2), np.int32), Counter(), 0, {}, [])
        turned = 0
        for i in range(count):
            try:
                content = self.source.read(start + i)
                found.hashes[i] = content_hash(content)
                turned += self._note_kind(content, found)
                found.sizes[i] = self.decoder.pixels(content).shape[1:]
            except UNREADABLE as error:
                found.unreadable.append((start + i, why_unreadable(error)))
        return found._replace(turned=turned)

    def _note_kind(self, content: Content, found: ChunkScan) -> bool:
        """Whether EXIF asks for a rotation."""
        stored = self.plain.stored(content)
        found.kinds[kind(content, stored)] += 1
        if isinstance(stored, Image.Image):
            return orientation(stored) != 1
        if stored.dtype.itemsize > 1 and stored.dtype.kind in "uif" and np.isfinite(stored).any():
            finite = stored[np.isfinite(stored)]
            name, span = str(stored.dtype.newbyteorder("=")), (float(finite.min()), float(finite.max()))
            found.deep[name] = joined(found.deep.get(name, span), span)
        return False


def scan(
    source: ImageSource, *, config: DataConfig, workers: int, title: str, on_unreadable: Callable[[int, str], Any]
) -> ScanResult:
    """Look at all images, with a progress bar; `on_unreadable` hears index and reason of each that cannot be used."""
    whole = ScanResult(np.zeros(len(source), np.uint64), np.zeros((len(source), 2), np.int32))

    def take(looked: ChunkScan) -> int:
        whole.add(looked)
        for index, reason in looked.unreadable:
            on_unreadable(index, reason)
        return len(looked.hashes)

    in_parallel(ScanDataset(source, config=config), take, workers=workers, title=title)
    return whole


class Sums(Dataset[tuple[int, int, np.ndarray, int]]):
    """Item k: images, pixels, (sum, sum of squares) (2, C) of their values in 0 to 255, and unreadable images."""

    def __init__(self, source: ImageSource, indices: np.ndarray, *, config: DataConfig) -> None:
        self.source, self.indices, self.images = source, indices, len(indices)
        self.channels, self.decoder = config.channels, Decoder(config)

    def __len__(self) -> int:
        return -(-self.images // CHUNK)

    def __getitem__(self, number: int) -> tuple[int, int, np.ndarray, int]:
        chosen = self.indices[number * CHUNK : (number + 1) * CHUNK]
        sums, count, unreadable = np.zeros((2, self.channels), np.int64), 0, 0
        for index in chosen:
            try:
                pixels = self.decoder.pixels(self.source.read(int(index))).flatten(1).numpy()
            except UNREADABLE as error:
                why_unreadable(error)
                unreadable += 1
                continue
            count += pixels.shape[1]
            sums += pixels.sum(1, dtype=np.int64), (pixels.astype(np.uint16) ** 2).sum(1, dtype=np.int64)
        return len(chosen) - unreadable, count, sums, unreadable


def moments(source: ImageSource, indices: np.ndarray, *, config: DataConfig, workers: int) -> Moments | None:
    """Mean and standard deviation of the images `indices`, from exact sums; None where none of them is readable."""
    images, pixels, unreadable = 0, 0, 0
    sums = np.zeros((2, config.channels), np.int64)

    def take(part: tuple[int, int, np.ndarray, int]) -> int:
        nonlocal images, pixels, unreadable, sums
        images, pixels, unreadable = images + part[0], pixels + part[1], unreadable + part[3]
        sums = sums + part[2]
        return part[0] + part[3]

    in_parallel(Sums(source, indices, config=config), take, workers=workers, title="reading")
    if not pixels:
        return None
    totals, squares = sums.tolist()  # Python's numbers, which do not overflow
    variances = [(pixels * square - total**2) / pixels**2 for total, square in zip(totals, squares, strict=True)]
    mean: list[float] = [total / pixels / 255 for total in totals]
    std = [math.sqrt(variance) / 255 for variance in variances]
    return Moments(mean, std, images, unreadable)


def in_parallel(parts: ScanDataset | Sums, take: Callable[[Any], int], *, workers: int, title: str) -> None:
    """Hand every item of `parts` to `take`, in order, which returns the number of images that it stands for."""
    loader: Any = DataLoader(
        parts, batch_size=None, num_workers=min(workers, len(parts)), collate_fn=_as_it_is, worker_init_fn=_hush
    )
    with progress_bar() as bar:
        task = bar.add_task(title, total=parts.images)
        for item in loader:
            bar.advance(task, take(item))


def duplicates(scan: ScanResult) -> tuple[int, list[tuple[int, int]]]:
    """Readable images that are copies of an earlier one, and up to three examples (copy, original)."""
    indices = np.flatnonzero(scan.readable)
    order = indices[np.argsort(scan.hashes[indices], kind="stable")]
    hashes = scan.hashes[order]
    copies = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1
    return len(copies), [(int(order[at]), int(order[at - 1])) for at in copies[:3]]


def shared(train: ScanResult, val: ScanResult) -> tuple[int, list[tuple[int, int]]]:
    """Readable images of `val` that are in `train` too, and up to three examples (val, train)."""
    bank, queries = (np.flatnonzero(part.readable) for part in (train, val))
    order = bank[np.argsort(train.hashes[bank], kind="stable")]
    if not len(order):
        return 0, []
    hashes = train.hashes[order]
    places = np.searchsorted(hashes, val.hashes[queries]).clip(max=len(hashes) - 1)
    same = np.flatnonzero(hashes[places] == val.hashes[queries])
    return len(same), [(int(queries[at]), int(order[places[at]])) for at in same[:3]]


def content_hash(content: Content) -> int:
    """64 bits: among ten million different images two of a hash are a chance of 1 in 400,000."""
    digest = hashlib.blake2b(content if isinstance(content, bytes) else content.tobytes(), digest_size=8)
    if isinstance(content, np.ndarray):
        digest.update(f"{content.shape} {content.dtype}".encode())
    return int.from_bytes(digest.digest())


def kind(content: Content, stored: Image.Image | np.ndarray) -> str:
    """Format, colors and number type, in words."""
    if isinstance(content, np.ndarray):
        form = "array"
    else:
        starts = {"JPEG": JPEG, "PNG": PNG, "TIFF": TIFF, "npy": NPY}
        named = next((name for name, start in starts.items() if content.startswith(start)), "")
        form = named or getattr(stored, "format", None) or "other"
    if isinstance(stored, np.ndarray):
        channels = stored.shape[2] if stored.ndim == 3 else 1
        return f"{form} {channels} channel{'s' * (channels != 1)} {stored.dtype.newbyteorder('=')}"
    bits = max(getattr(stored, "tag_v2", {}).get(BITS_PER_SAMPLE, (8,)))
    deep = bits > 8 or (form == "PNG" and isinstance(content, bytes) and content[24] == 16)
    return f"{form} {MODES.get(stored.mode, stored.mode)}{' (16 bits, read as 8)' if deep else ''}"


def orientation(image: Image.Image) -> int:
    """EXIF's number; 1 is upright, and stands for none and for nonsense."""
    try:
        number = image.getexif().get(ORIENTATION, 1)
    except Exception:  # PIL raises many things at broken EXIF, which do not matter for the pixels
        return 1
    return number if number in range(2, 9) else 1


def joined(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """The range that holds both."""
    return min(one[0], other[0]), max(one[1], other[1])


def _as_it_is(item: Any) -> Any:
    return item


def _hush(_worker: int) -> None:
    """libjpeg and libtiff complain about every broken file, right into the progress bar."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
