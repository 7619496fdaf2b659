"""The list of the image files below a folder, made once and kept in `data.cache_dir`.

Listing a million files takes seconds on a local disk and minutes on a network. What is kept is trusted as long as every
folder has the times (modified, changed) that it had when it was listed, so a start looks at the folders only; of a
folder that changed, and of new ones, the files are listed again. File systems that show made-up times (some mounts of
object stores) defeat this: there, remove `indices` in the cache after a change.
"""

import contextlib
import os
import time
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.text import Text
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from dino_lightning.data.sources.mapped_arrays import (
    LARGE,
    MappedArrays,
    Paths,
    cache_place,
    offsets_of,
    open_stored,
    store,
)

TRUSTED_AFTER_NS = 2_000_000_000
"""A folder that changed so shortly before it was listed may change again without a new time; it is listed again."""
SHOWN_AFTER = 1.0
"""Seconds after which the progress is shown."""
STEP = 4096
"""Files between two reports of the progress."""
READ, LOOP, CLOSED = range(3)
"""What became of a folder: its files are listed; it is a link to a folder above it; it cannot be opened."""
BROKEN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
"""What reading a damaged or foreign list raises."""
UNKNOWN = (-1, -1)
"""Times that no folder has."""

Stamp = tuple[int, int]


@dataclass
class IndexedFolder:
    """A folder: its path relative to the root ("" for the root), and its images' paths one after another in `blob`."""

    path: str
    group: int
    stamp: Stamp
    state: int
    blob: bytes
    lengths: np.ndarray


class FileIndex:
    """The images below some folders of `root`.

    `paths` are relative to `root`; `groups` (n,) int64 says below which of the folders a file lies. Both are pickled by
    name where they are kept in files. `loops` and `closed` are the folders that could not be followed or opened.
    """

    def __init__(self, kept: MappedArrays, *, loops: list[str], closed: list[str]):
        self.kept, self.loops, self.closed = kept, loops, closed
        self.paths = Paths(kept)

    @property
    def groups(self) -> np.ndarray:
        """Number of the folder (n,) int64."""
        return self.kept["groups"]

    def notice(self) -> str | None:
        """One line on the folders that were left out."""
        told = []
        for names, reason in ((self.loops, "a link to a folder above it"), (self.closed, "cannot be opened")):
            if names:
                others = f" and {len(names) - 1} more" * (len(names) > 1)
                told.append(f"left out, {reason}: '{names[0]}'{others}")
        return "; ".join(told) or None


class KnownFolders:
    """A list of files as it was kept in `place`. Raises one of `BROKEN` where it is damaged."""

    def __init__(self, place: Path):
        self.place, self.kept = place, open_stored(place)
        with np.load(place / "folders.npz") as table:
            self.below, self.names = _names(table["below"]), _names(table["names"])
            self.stamps, self.states, self.starts = table["stamps"], table["states"], table["starts"]
        offsets, count = self.kept["offsets"], len(self.kept["groups"])
        sizes = (len(self.stamps), len(self.states), len(self.starts) - 1, len(offsets) - 1, int(offsets[-1]))
        rows = len(self.names)
        if sizes != (rows, rows, rows, count, len(self.kept["blob"])) or self.starts[-1] != count:
            raise ValueError(f"'{place}' is not a list of files")

    @cached_property
    def rows(self) -> dict[str, int]:
        """Row of each folder."""
        return {name: row for row, name in enumerate(self.names)}

    @cached_property
    def inside(self) -> dict[str, list[str]]:
        """Paths of the folders directly in a folder."""
        found: dict[str, list[str]] = {}
        for name in filter(None, self.names):
            found.setdefault(os.path.dirname(name), []).append(name)
        return found

    def unchanged(self, root: str, *, below: list[str]) -> bool:
        """Whether the list is what listing `below` again would give."""
        return self.below == below and all(
            _stamp_of(os.path.join(root, name)) == tuple(stamp)
            for name, stamp in zip(self.names, self.stamps.tolist(), strict=True)
        )

    def row(self, path: str, *, stamp: Stamp) -> int | None:
        """The row of a folder that has not changed since."""
        row = self.rows.get(path)
        known = row is not None and tuple(self.stamps[row].tolist()) == stamp != UNKNOWN
        return row if known and self.states[row] != LOOP else None

    def files(self, row: int) -> tuple[bytes, np.ndarray]:
        """Blob and lengths of a folder's files."""
        offsets = self.kept["offsets"][self.starts[row] : self.starts[row + 1] + 1]
        return self.kept["blob"][offsets[0] : offsets[-1]].tobytes(), np.diff(offsets)

    def index(self) -> FileIndex:
        """The list itself, marked as used."""
        with contextlib.suppress(OSError):
            os.utime(self.place)
        loops, closed = ([self.names[row] for row in np.flatnonzero(self.states == state)] for state in (LOOP, CLOSED))
        return FileIndex(self.kept, loops=loops, closed=closed)


def index_files(root: str | Path, *, below: list[str], cache_dir: str) -> FileIndex:
    """The images at any depth under the folders `below` (relative to `root`; "" is `root`), hidden ones left out.

    They stand by number of the folder, then by the path of the folder that holds them, then by name: the order of
    torchvision's `ImageFolder`, so that a seed means the same images there. Links are followed.
    """
    root = os.path.abspath(root)
    place = cache_place(cache_dir, of=root)
    known = _newest(place)
    if known and known.unchanged(root, below=below):
        return known.index()
    walk = Walk(root, below=below, known=known)
    steps = walk.steps()
    if not any(count >= LARGE for count in steps):
        return _index(walk.folders, below=below, place=None)
    with _alone(place):  # whoever waited finds the other's list
        known = _newest(place)
        if known and known.unchanged(root, below=below):
            return known.index()
        _finish(steps, root=root)
        return _index(walk.folders, below=below, place=place)


def folder_contents(root: str | Path, *, cache_dir: str) -> tuple[list[str], bool]:
    """Sorted names of the folders directly under `root`, and whether an image lies beside them; hidden ones left out.

    Where all files of `root` are listed and it has not changed, this is known without reading it.
    """
    known = _newest(cache_place(cache_dir, of=root))
    row = known.row("", stamp=_stamp_of(os.path.abspath(root))) if known else None
    if known and row is not None:
        return sorted(known.inside.get("", [])), bool(known.starts[row + 1] > known.starts[row])
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
    """Whether a file name has the ending of an image and is not hidden."""
    return not name.startswith(".") and has_file_allowed_extension(name, IMG_EXTENSIONS)


class Walk:
    """All folders under `below`; those that `known` has as they are now are not read again."""

    def __init__(self, root: str, *, below: list[str], known: KnownFolders | None):
        self.root, self.below, self.known = root, below, known
        self.folders: list[IndexedFolder] = []
        self.count = 0

    def steps(self) -> Iterator[int]:
        """Walk, giving the number of files found so far every now and then."""
        status = os.stat(self.root)
        top = frozenset([(status.st_dev, status.st_ino)])
        waiting = [(name, group, top if name else frozenset()) for group, name in enumerate(self.below)]
        while waiting:
            path, group, above = waiting.pop()
            now = time.time_ns()
            try:
                status = os.stat(os.path.join(self.root, path))
            except OSError:
                self._add(path, group, stamp=UNKNOWN, state=CLOSED)
                continue
            # Before its files are read: what changes meanwhile shows at the next start.
            stamp = _stamp(status)
            row = self.known.row(path, stamp=stamp) if self.known else None
            stamp = UNKNOWN if now - max(stamp) < TRUSTED_AFTER_NS else stamp
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                self._add(path, group, stamp=stamp, state=LOOP)
                continue
            if self.known and row is not None:
                inside = self.known.inside.get(path, [])
                self._add(path, group, stamp=stamp, state=int(self.known.states[row]), files=self.known.files(row))
            else:
                inside = yield from self._read(path, group, stamp=stamp)
            waiting += ((name, group, above | {identity}) for name in inside)
            yield self.count

    def _read(self, path: str, group: int, *, stamp: Stamp) -> Iterator[int]:
        """Add a folder, giving the count as `steps` does; returns the paths of the folders in it."""
        prefix = f"{path}/" if path else ""
        inside, names, state = [], [], READ
        try:
            with os.scandir(os.path.join(self.root, path)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        inside.append(prefix + entry.name)
                    elif is_image(entry.name):
                        names.append(entry.name)
                        if len(names) % STEP == 0:
                            yield self.count + len(names)
        except OSError:
            state = CLOSED
        encoded = [os.fsencode(prefix + name) for name in sorted(names)]
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        self._add(path, group, stamp=stamp, state=state, files=(b"".join(encoded), lengths))
        return inside

    def _add(
        self,
        path: str,
        group: int,
        *,
        stamp: Stamp,
        state: int,
        files: tuple[bytes, np.ndarray] = (b"", np.zeros(0, dtype=np.int64)),
    ) -> None:
        self.folders.append(IndexedFolder(path, group, stamp, state, *files))
        self.count += len(files[1])


def _finish(steps: Iterator[int], *, root: str) -> None:
    """Walk to the end; where that takes longer, the number of images found is shown."""
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        status = None
        for count in steps:
            if status is None and time.monotonic() - start > SHOWN_AFTER:
                status = stack.enter_context(Console(stderr=True, force_jupyter=False).status(""))
            if status is not None:
                status.update(Text(f"{count:,} images found in {root}"))


def _index(folders: list[IndexedFolder], *, below: list[str], place: Path | None) -> FileIndex:
    """The list of the walked folders, kept below `place`."""
    folders.sort(key=lambda folder: (folder.group, folder.path))
    counts = [len(folder.lengths) for folder in folders]
    arrays = {
        "blob": np.frombuffer(b"".join(folder.blob for folder in folders), dtype=np.uint8),
        "offsets": offsets_of(np.concatenate([folder.lengths for folder in folders])),
        "groups": np.repeat(np.array([folder.group for folder in folders], dtype=np.int64), counts),
    }
    kept = store(arrays, under=place) if place else MappedArrays(arrays)
    if kept.place:
        with contextlib.suppress(OSError):
            _write_folders(kept.place, folders, below=below, starts=offsets_of(np.array(counts)))
    loops, closed = ([folder.path for folder in folders if folder.state == state] for state in (LOOP, CLOSED))
    return FileIndex(kept, loops=loops, closed=closed)


def _write_folders(place: Path, folders: list[IndexedFolder], *, below: list[str], starts: np.ndarray) -> None:
    unfinished = place / f".{uuid.uuid4().hex}.npz"
    try:
        np.savez(
            unfinished,
            below=_joined(below),
            names=_joined([folder.path for folder in folders]),
            stamps=np.array([folder.stamp for folder in folders], dtype=np.int64),
            states=np.array([folder.state for folder in folders], dtype=np.int8),
            starts=starts,
        )
        os.replace(unfinished, place / "folders.npz")
    finally:
        unfinished.unlink(missing_ok=True)


def _newest(place: Path) -> KnownFolders | None:
    """The list that was used last, of those that can be read."""
    with contextlib.suppress(OSError):
        for folder in sorted(place.iterdir(), key=lambda folder: folder.stat().st_mtime_ns, reverse=True):
            with contextlib.suppress(*BROKEN):
                return KnownFolders(folder)
    return None


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """One process at a time, where the cache can be written."""
    lock = None
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / "lock")
        lock.acquire()
    except (OSError, NotImplementedError):  # the latter: a file system without locks
        lock = None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _stamp(status: os.stat_result) -> Stamp:
    # The second one catches tools that copy times, such as rsync, when they add a file and set the old time again.
    return status.st_mtime_ns, status.st_ctime_ns


def _stamp_of(folder: str) -> Stamp:
    try:
        return _stamp(os.stat(folder))
    except OSError:
        return (-2, -2)


def _joined(names: list[str]) -> np.ndarray:
    return np.frombuffer(os.fsencode("\0".join(names)), dtype=np.uint8)


def _names(joined: np.ndarray) -> list[str]:
    return os.fsdecode(joined.tobytes()).split("\0")
