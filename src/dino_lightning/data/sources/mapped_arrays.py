"""Arrays that grow with the number of images, memory-mapped from a cache so that all processes share them.

A forked loader process shares its parent's arrays. A spawned one, and every other rank, would have its own copy; arrays
that are files are pickled by name instead, and all processes map the same pages.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dino_lightning.data.sources.base import content_digest
from dino_lightning.runtime.files import atomic_folder

LARGE = 10_000
"""Number of images from which on a list is stored in files."""
UNUSED_DAYS = 30
"""Days after which stored arrays that nobody opened are removed, when new ones are written next to them."""
BROKEN = (OSError, ValueError, EOFError)
"""Errors of `np.load` for missing, damaged and empty files."""


class MappedArrays:
    """Named arrays; read-only and pickled by name if they are mapped from `folder`."""

    def __init__(self, arrays: dict[str, np.ndarray], *, folder: Path | None = None):
        self.arrays, self.folder = arrays, folder

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __reduce__(self) -> tuple[Callable[..., "MappedArrays"], tuple[Any, ...]]:
        return (MappedArrays, (self.arrays,)) if self.folder is None else (open_stored, (self.folder,))


class Paths:
    """The paths `blob[offsets[i]:offsets[i + 1]]` of `arrays`: n Python strings would be copied into every process."""

    def __init__(self, arrays: MappedArrays):
        self.blob, self.offsets = arrays["blob"], arrays["offsets"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self.blob[self.offsets[index] : self.offsets[index + 1]].tobytes())


class ImageFiles:
    """Images that are files below `root`, by default the `Paths` of `arrays`.

    `labels` names the array of their labels (n,) int64, -1 for an unlabeled image; there are none without `classes`.
    """

    path_arrays = ("blob", "offsets")
    """Names of the arrays that determine all paths."""

    def __init__(
        self, root: Path | str, *, arrays: MappedArrays, classes: list[str] | None, labels: str = "labels"
    ) -> None:
        self.root, self.arrays, self.classes, self._labels = str(root), arrays, classes, labels

    @property
    def labels(self) -> np.ndarray | None:
        """Index of the class (n,) int64; None without labels."""
        return None if self.classes is None else self.arrays[self._labels]

    def __len__(self) -> int:
        return len(Paths(self.arrays))

    def read(self, index: int) -> bytes:
        """The bytes of the file."""
        with open(self.describe(index), "rb") as file:
            return file.read()

    def describe(self, index: int) -> str:
        """Path of the file."""
        return os.path.join(self.root, Paths(self.arrays)[index])

    def fingerprint(self) -> str:
        """Digest of the files' paths, sizes and times."""
        stats = (number for i in range(len(self)) for number in _size_and_time(self.describe(i)))
        arrays = [*(self.arrays[name] for name in self.path_arrays), np.fromiter(stats, dtype=np.int64)]
        return content_digest(*(array.tobytes() for array in arrays))


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1  # impossible for an existing file
    return status.st_size, status.st_mtime_ns


def pack_paths(paths: Iterable[bytes]) -> dict[str, np.ndarray]:
    """`blob` uint8 and `offsets` int64 (n + 1,) of the paths, for `Paths`."""
    listed = list(paths)
    return {
        "blob": np.frombuffer(b"".join(listed), dtype=np.uint8),
        "offsets": offsets_from(np.fromiter(map(len, listed), dtype=np.int64, count=len(listed))),
    }


def offsets_from(lengths: np.ndarray) -> np.ndarray:
    """Start of each piece, and the end of the last one (n + 1,) int64."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])


def index_folder(cache_dir: str, *, of: str | Path) -> Path:
    """The cache folder of the arrays that belong to the folder or file `of`."""
    return Path(cache_dir).expanduser() / "indices" / content_digest(os.fsencode(os.path.abspath(of)))


def store(arrays: dict[str, np.ndarray], *, under: Path) -> MappedArrays:
    """Store the arrays in a folder below `under` and map them; return them unmapped if that fails.

    The folder's name is a digest of the contents, so a process with older arrays keeps its files.
    """
    parts = (part for name, array in sorted(arrays.items()) for part in (name.encode(), array.tobytes()))
    folder = under / content_digest(*parts)
    try:
        if not _contains(folder, arrays):
            under.mkdir(parents=True, exist_ok=True)
            _remove_unused(under)
            _write(folder, arrays)
        os.utime(folder)
        return open_stored(folder)
    except BROKEN:
        return MappedArrays(arrays)


def store_if_large(arrays: dict[str, np.ndarray], *, images: int, cache_dir: str, of: Path) -> MappedArrays:
    """The arrays that list the images of the file `of`, stored in the cache from `LARGE` images on."""
    return MappedArrays(arrays) if images < LARGE else store(arrays, under=index_folder(cache_dir, of=of))


def open_stored(folder: Path) -> MappedArrays:
    """Map the arrays of a folder. Raises one of `BROKEN` if they are missing or damaged."""
    files = sorted(folder.glob("*.npy"))
    if not files:
        raise FileNotFoundError(folder)
    # asarray, because indexing an `np.memmap` is several times slower than indexing an array on top of it.
    return MappedArrays({file.stem: np.asarray(np.load(file, mmap_mode="r")) for file in files}, folder=folder)


def _contains(folder: Path, arrays: dict[str, np.ndarray]) -> bool:
    try:
        return open_stored(folder).arrays.keys() == arrays.keys()  # the folder's name is a digest of the contents
    except BROKEN:
        return False


def _write(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    try:
        with atomic_folder(folder) as unfinished:
            for name, array in arrays.items():
                np.save(unfinished / f"{name}.npy", array)
            if folder.exists():  # damaged
                shutil.rmtree(folder)
    except OSError:
        if not _contains(folder, arrays):  # otherwise another process was faster
            raise


def _remove_unused(under: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for folder in under.iterdir():
        if folder.is_dir() and folder.stat().st_mtime < oldest:
            shutil.rmtree(folder, ignore_errors=True)
