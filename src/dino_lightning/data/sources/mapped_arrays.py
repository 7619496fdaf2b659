"""Arrays that grow with the number of images, shared by all processes: mapped from files where a cache can be written.

A loader process that is forked shares its parent's arrays anyway. One that is spawned, and every other rank, would have
a copy of its own; with a file behind them the arrays are pickled by name and all processes map the same pages.
"""

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dino_lightning.data.sources.base import content_digest

LARGE = 10_000
"""Images from which on a list is worth keeping in files."""
UNUSED_DAYS = 30
"""Kept arrays that nobody opened for longer are removed when new ones are written beside them."""

BROKEN = (OSError, ValueError, EOFError)
"""What `np.load` raises on files that are gone, damaged or empty."""


class MappedArrays:
    """Named arrays, read-only where they are mapped from the folder `place`."""

    def __init__(self, arrays: dict[str, np.ndarray], *, place: Path | None = None):
        self.arrays, self.place = arrays, place

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __reduce__(self) -> tuple[Callable[..., "MappedArrays"], tuple[Any, ...]]:
        return (MappedArrays, (self.arrays,)) if self.place is None else (open_stored, (self.place,))


class Paths:
    """The paths `blob[offsets[i]:offsets[i + 1]]` of `kept`: n Python strings would be copied into every process."""

    def __init__(self, kept: MappedArrays):
        self.kept = kept
        self.blob, self.offsets = kept["blob"], kept["offsets"]

    def __reduce__(self) -> tuple[type["Paths"], tuple[MappedArrays]]:
        return Paths, (self.kept,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self.blob[self.offsets[index] : self.offsets[index + 1]].tobytes())


def packed(paths: Iterable[bytes]) -> dict[str, np.ndarray]:
    """`blob` uint8 and `offsets` int64 (n + 1,) of the paths, for `Paths`."""
    known = list(paths)
    lengths = np.fromiter(map(len, known), dtype=np.int64, count=len(known))
    return {"blob": np.frombuffer(b"".join(known), dtype=np.uint8), "offsets": offsets_of(lengths)}


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Where each piece begins and the last one ends (n + 1,) int64."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])


def cache_place(cache_dir: str, *, of: str | Path) -> Path:
    """The folder of the arrays that belong to the folder or file `of`."""
    return Path(cache_dir).expanduser() / "indices" / content_digest(os.fsencode(os.path.abspath(of)))


def store(arrays: dict[str, np.ndarray], *, under: Path) -> MappedArrays:
    """The arrays from files below `under`, written first where they are new; as they are where that cannot be done.

    The folder's name comes from the contents: whoever opened other contents before can open them again.
    """
    parts = (part for name, array in sorted(arrays.items()) for part in (name.encode(), array.tobytes()))
    place = under / content_digest(*parts)
    try:
        if not _holds(place, arrays):
            under.mkdir(parents=True, exist_ok=True)
            _remove_unused(under)
            _write(place, arrays)
        os.utime(place)
        return open_stored(place)
    except BROKEN:
        return MappedArrays(arrays)


def open_stored(place: Path) -> MappedArrays:
    """The arrays of a folder. Raises one of `BROKEN` where they are gone or damaged."""
    files = sorted(place.glob("*.npy"))
    if not files:
        raise FileNotFoundError(place)
    # A plain array over the mapping: indexing an `np.memmap` is several times slower.
    return MappedArrays({file.stem: np.asarray(np.load(file, mmap_mode="r")) for file in files}, place=place)


def files_digest(names: list[np.ndarray], *, files: Iterable[str]) -> str:
    """A text that changes with `names` and with the size or the time of any of the files."""
    states = np.fromiter((number for file in files for number in _state(file)), dtype=np.int64)
    return content_digest(*(array.tobytes() for array in names), states.tobytes())


def _state(file: str) -> tuple[int, int]:
    """Size and time; of a file that is not there, numbers that no file has."""
    try:
        status = os.stat(file)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _holds(place: Path, arrays: dict[str, np.ndarray]) -> bool:
    try:
        kept = open_stored(place).arrays
    except BROKEN:
        return False
    return kept.keys() == arrays.keys() and all(
        kept[name].dtype == array.dtype and np.array_equal(kept[name], array) for name, array in arrays.items()
    )


def _write(place: Path, arrays: dict[str, np.ndarray]) -> None:
    unfinished = place.parent / f".{uuid.uuid4().hex}"
    unfinished.mkdir()
    try:
        for name, array in arrays.items():
            np.save(unfinished / f"{name}.npy", array)
        if place.exists():
            shutil.rmtree(place)  # damaged
        try:
            os.rename(unfinished, place)
        except OSError:
            if not _holds(place, arrays):  # else another process came first
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _remove_unused(under: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for folder in under.iterdir():
        if folder.is_dir() and folder.stat().st_mtime < oldest:
            shutil.rmtree(folder, ignore_errors=True)
