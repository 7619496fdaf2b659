"""The list of the image files below a folder, stored in `data.cache_dir` for large folders.

Listing a million files takes seconds on a local disk and minutes on a network. A stored list is trusted while every
folder has the times (modified, changed) that it had when it was listed, so a later start only stats the folders; the
files of new and changed folders are listed again. File systems with artificial times (some mounts of object stores)
break this: there, remove `indices` in the cache after a change.
"""

import contextlib
import os
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from dino_lightning.data.sources.base import join_remarks
from dino_lightning.data.sources.mapped_arrays import (
    LARGE,
    MappedArrays,
    index_folder,
    offsets_from,
    open_stored,
    store,
)
from dino_lightning.runtime.files import atomic_file
from dino_lightning.runtime.locks import exclusive

MIN_AGE_NS = 2_000_000_000
"""Age at which the time of a folder is trusted: a folder may change again without a new time shortly after a change."""
PROGRESS_DELAY_S = 1.0
"""Time after which the progress is shown."""
PROGRESS_INTERVAL = 4096
"""Files between two progress updates."""
LISTED, LOOP, CLOSED = range(3)
"""State of a folder: its files are listed; it is a link to a folder above it; it cannot be opened."""
BROKEN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
"""Errors of reading a damaged or foreign list."""
UNKNOWN = (-1, -1)
"""A stamp that no folder has."""

Stamp = tuple[int, int]
"""Times at which a folder was modified and changed (ns)."""


@dataclass
class IndexedFolder:
    """A folder: its path relative to the root ("" for the root), and the concatenated paths of its images in `blob`."""

    path: str
    group: int
    stamp: Stamp
    state: int
    blob: bytes = b""
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


@dataclass(frozen=True)
class FileIndex:
    """The images below some folders of a root.

    `arrays` contains their paths relative to the root (`blob`, `offsets`), and `groups` (n,) int64, the index of the
    folder that contains the file. `loops` and `closed` are folders that could not be followed or opened.
    """

    arrays: MappedArrays
    loops: list[str]
    closed: list[str]

    def remark(self) -> str | None:
        """One line about the folders that were left out."""
        remarks = []
        for names, reason in ((self.loops, "a link to a folder above it"), (self.closed, "cannot be opened")):
            if names:
                others = f" and {len(names) - 1} more" * (len(names) > 1)
                remarks.append(f"left out, {reason}: '{names[0]}'{others}")
        return join_remarks(*remarks)


class StoredIndex:
    """A stored list of files. Raises one of `BROKEN` if it is damaged."""

    def __init__(self, folder: Path):
        self.folder, self.arrays = folder, open_stored(folder)
        if self.arrays.arrays.keys() != {"blob", "offsets", "groups"}:
            raise ValueError(f"'{folder}' is not a list of files")
        with np.load(folder / "folders.npz") as table:
            self.below, self.names = _split_names(table["below"]), _split_names(table["names"])
            self.stamps, self.states, self.starts = table["stamps"], table["states"], table["starts"]

    @cached_property
    def rows(self) -> dict[str, int]:
        """Row of each folder."""
        return {name: row for row, name in enumerate(self.names)}

    @cached_property
    def subfolders(self) -> dict[str, list[str]]:
        """Paths of the folders directly in a folder."""
        children: dict[str, list[str]] = {}
        for name in filter(None, self.names):
            children.setdefault(os.path.dirname(name), []).append(name)
        return children

    def is_current(self, root: str, *, below: list[str]) -> bool:
        """Whether listing `below` now would give the same list."""
        return self.below == below and all(
            _stamp_of(os.path.join(root, name)) == tuple(stamp)
            for name, stamp in zip(self.names, self.stamps.tolist(), strict=True)
        )

    def row(self, path: str, *, stamp: Stamp) -> int | None:
        """The row of a folder, if it has not changed since."""
        row = self.rows.get(path)
        unchanged = row is not None and tuple(self.stamps[row].tolist()) == stamp != UNKNOWN
        return row if unchanged and self.states[row] != LOOP else None

    def files(self, row: int) -> tuple[bytes, np.ndarray]:
        """Blob and lengths of a folder's files."""
        offsets = self.arrays["offsets"][self.starts[row] : self.starts[row + 1] + 1]
        return self.arrays["blob"][offsets[0] : offsets[-1]].tobytes(), np.diff(offsets)

    def file_index(self) -> FileIndex:
        """The list, marked as used."""
        with contextlib.suppress(OSError):
            os.utime(self.folder)
        loops, closed = ([self.names[row] for row in np.flatnonzero(self.states == state)] for state in (LOOP, CLOSED))
        return FileIndex(self.arrays, loops, closed)


def index_files(root: str | Path, *, below: list[str], cache_dir: str) -> FileIndex:
    """The images at any depth in the folders `below` (relative to `root`; "" is `root`), without hidden ones.

    They are sorted by index of the folder, then by the path of their folder, then by name, which is the order of
    torchvision's `ImageFolder`, so that a seed selects the same images. Symbolic links are followed.
    """
    root = os.path.abspath(root)
    cache = index_folder(cache_dir, of=root)
    stored = _newest(cache)
    if stored and stored.is_current(root, below=below):
        return stored.file_index()
    walker = FolderWalker(root, below=below, stored=stored)
    counts = walker.walk()
    if not any(count >= LARGE for count in counts):
        return _index(walker.folders, below=below, cache=None)
    with exclusive(cache / "lock", required=False):
        stored = _newest(cache)  # another process may have written it meanwhile
        if stored and stored.is_current(root, below=below):
            return stored.file_index()
        _finish(counts, root=root)
        return _index(walker.folders, below=below, cache=cache)


def folder_contents(root: str | Path, *, cache_dir: str) -> tuple[list[str], bool]:
    """Sorted names of the folders directly in `root`, and whether it also contains an image; without hidden ones.

    If all files of `root` are in a current list, the folder is not read.
    """
    stored = _newest(index_folder(cache_dir, of=root))
    row = stored.row("", stamp=_stamp_of(os.path.abspath(root))) if stored else None
    if stored and row is not None:
        return sorted(stored.subfolders.get("", [])), bool(stored.starts[row + 1] > stored.starts[row])
    folders, has_image = [], False
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            else:
                has_image = has_image or is_image(entry.name)
    return sorted(folders), has_image


def is_image(name: str) -> bool:
    """Whether a file name has an image extension and is not hidden."""
    return not name.startswith(".") and has_file_allowed_extension(name, IMG_EXTENSIONS)


class FolderWalker:
    """Lists all folders in `below`; folders that are unchanged in `stored` are not read again."""

    def __init__(self, root: str, *, below: list[str], stored: StoredIndex | None):
        self.root, self.below, self.stored = root, below, stored
        self.folders: list[IndexedFolder] = []
        self.count = 0

    def walk(self) -> Iterator[int]:
        """List the folders, yielding the number of files from time to time."""
        status = os.stat(self.root)
        root_identity = frozenset([(status.st_dev, status.st_ino)])
        pending = [(name, group, root_identity if name else frozenset()) for group, name in enumerate(self.below)]
        while pending:
            path, group, ancestors = pending.pop()
            now = time.time_ns()
            try:
                status = os.stat(os.path.join(self.root, path))
            except OSError:
                self._add(IndexedFolder(path, group, UNKNOWN, CLOSED))
                continue
            # Taken before the files are read, so that the next start notices changes meanwhile.
            stamp = _stamp(status)
            row = self.stored.row(path, stamp=stamp) if self.stored else None
            stamp = UNKNOWN if now - max(stamp) < MIN_AGE_NS else stamp
            identity = (status.st_dev, status.st_ino)
            if identity in ancestors:
                self._add(IndexedFolder(path, group, stamp, LOOP))
                continue
            if self.stored and row is not None:
                subfolders = self.stored.subfolders.get(path, [])
                self._add(IndexedFolder(path, group, stamp, int(self.stored.states[row]), *self.stored.files(row)))
            else:
                subfolders = yield from self._read(path, group, stamp=stamp)
            pending += ((name, group, ancestors | {identity}) for name in subfolders)
            yield self.count

    def _read(self, path: str, group: int, *, stamp: Stamp) -> Iterator[int]:
        """Add a folder, yielding the count like `walk`; returns the paths of its subfolders."""
        prefix = f"{path}/" if path else ""
        subfolders, names, state = [], [], LISTED
        try:
            with os.scandir(os.path.join(self.root, path)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        subfolders.append(prefix + entry.name)
                    elif is_image(entry.name):
                        names.append(entry.name)
                        if len(names) % PROGRESS_INTERVAL == 0:
                            yield self.count + len(names)
        except OSError:
            state = CLOSED
        encoded = [os.fsencode(prefix + name) for name in sorted(names)]
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        self._add(IndexedFolder(path, group, stamp, state, b"".join(encoded), lengths))
        return subfolders

    def _add(self, folder: IndexedFolder) -> None:
        self.folders.append(folder)
        self.count += len(folder.lengths)


def _finish(counts: Iterator[int], *, root: str) -> None:
    """Walk to the end; after a while, the number of images is shown."""
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        status = None
        for count in counts:
            if status is None and time.monotonic() - start > PROGRESS_DELAY_S:
                status = stack.enter_context(Console(stderr=True, force_jupyter=False).status(""))
            if status is not None:
                status.update(Text(f"{count:,} images found in {root}"))


def _index(folders: list[IndexedFolder], *, below: list[str], cache: Path | None) -> FileIndex:
    """The list of the walked folders, stored in `cache`."""
    folders.sort(key=lambda folder: (folder.group, folder.path))
    counts = [len(folder.lengths) for folder in folders]
    arrays = {
        "blob": np.frombuffer(b"".join(folder.blob for folder in folders), dtype=np.uint8),
        "offsets": offsets_from(np.concatenate([folder.lengths for folder in folders])),
        "groups": np.repeat(np.array([folder.group for folder in folders], dtype=np.int64), counts),
    }
    stored = store(arrays, under=cache) if cache else MappedArrays(arrays)
    if stored.folder:
        with contextlib.suppress(OSError), atomic_file(stored.folder / "folders.npz", unique=True) as file:
            np.savez(
                file,
                below=_join_names(below),
                names=_join_names([folder.path for folder in folders]),
                stamps=np.array([folder.stamp for folder in folders], dtype=np.int64),
                states=np.array([folder.state for folder in folders], dtype=np.int8),
                starts=offsets_from(np.array(counts)),
            )
    loops, closed = ([folder.path for folder in folders if folder.state == state] for state in (LOOP, CLOSED))
    return FileIndex(stored, loops, closed)


def _newest(cache: Path) -> StoredIndex | None:
    """The readable list that was used last."""
    with contextlib.suppress(OSError):
        for folder in sorted(cache.iterdir(), key=lambda folder: folder.stat().st_mtime_ns, reverse=True):
            with contextlib.suppress(*BROKEN):
                return StoredIndex(folder)
    return None


def _stamp(status: os.stat_result) -> Stamp:
    # The second time catches tools such as rsync that restore the first one after they add a file.
    return status.st_mtime_ns, status.st_ctime_ns


def _stamp_of(folder: str) -> Stamp:
    try:
        return _stamp(os.stat(folder))
    except OSError:
        return (-2, -2)


def _join_names(names: list[str]) -> np.ndarray:
    return np.frombuffer(os.fsencode("\0".join(names)), dtype=np.uint8)


def _split_names(joined: np.ndarray) -> list[str]:
    return os.fsdecode(joined.tobytes()).split("\0")
