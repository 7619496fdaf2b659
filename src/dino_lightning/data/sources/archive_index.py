"""The positions of the images in zip and tar files, read once and stored in `data.cache_dir` for large archives.

A tar has no table of contents: its headers are found one after the other, which takes minutes for a terabyte. A zip has
a table at its end, but only the header in front of an entry says where its data starts.
"""

import contextlib
import itertools
import os
import shutil
import stat
import struct
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from dino_lightning.data.sources.base import content_digest
from dino_lightning.data.sources.file_index import is_image
from dino_lightning.data.sources.mapped_arrays import MappedArrays, offsets_from, open_stored, store
from dino_lightning.errors import UserError
from dino_lightning.runtime.locks import exclusive

STORED_FROM_BYTES = 100_000_000
"""Size of all archives from which on the index is stored."""
FORMAT = b"2"
"""Changes if a stored index would be read incorrectly."""
THREADS = 8
"""Archives that are read concurrently: on a network file system each header costs a round trip."""
PROGRESS_INTERVAL = 256
"""Members between two progress updates."""
PROGRESS_DELAY_S = 1
"""Time after which the progress is shown."""
BLOCK = 512
"""Bytes per block of a tar; a block of zeros ends it."""
ENCRYPTED, UTF8_NAME = 1 << 0, 1 << 11
"""Flags of a zip entry."""
LOCAL_HEADER = struct.Struct("<26xHH")
"""The header in front of a zip entry's data: a name and an extra field of these lengths follow it."""
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
"""First bytes of a compressed file -> the command that decompresses it."""

ByteRange = tuple[int, int, int]
"""Start of an image's data in its archive, its length there, and its uncompressed length, -1 if it is not compressed
(bytes)."""
ProgressCallback = Callable[[int], None]
"""Called with the position reached in an archive (bytes)."""


class ArchiveFolder(NamedTuple):
    """The n images of one folder in an archive, sorted by name.

    `blob` contains their paths in the archive, with `lengths` (n,) int64; `ranges` (n, 3) int64 are their `ByteRange`s.
    """

    blob: bytes
    lengths: np.ndarray
    ranges: np.ndarray


def index_archives(files: list[Path], *, of: Path, cache_dir: str) -> MappedArrays:
    """The images inside the archives `files`, folder by folder.

    `blob` and `offsets` contain their paths inside the archive, `ranges` (n, 3) their `ByteRange`s. Folder i
    is the rows `starts[i]` to `starts[i + 1]`, sorted by name, of the archive `archives[i]`. `stats` (files, 2) are the
    sizes and times of the archives. The index is stored under the name `of` until one of the archives changes.
    """
    stats = np.array([(status.st_size, status.st_mtime_ns) for status in map(os.stat, files)], dtype=np.int64)
    if stats[:, 0].sum() < STORED_FROM_BYTES:
        return MappedArrays(_scan(files, stats=stats, of=of))
    key = content_digest(FORMAT, *(os.fsencode(file) for file in files), stats.tobytes()).encode()
    cache = Path(cache_dir).expanduser() / "archives" / content_digest(os.fsencode(of))
    with exclusive(cache / "lock", required=False):  # another process may be writing it
        index = _stored_index(cache, key=key)
        if index is None:
            arrays = _scan(files, stats=stats, of=of)
            index = store({**arrays, "key": np.frombuffer(key, dtype=np.uint8)}, under=cache)
    return index


def _stored_index(cache: Path, *, key: bytes) -> MappedArrays | None:
    """The stored index with this key, marked as used. Damaged ones are removed."""
    for folder in cache.glob("[!.]*/"):  # hidden folders are being written
        try:
            index = open_stored(folder)
        except OSError:
            continue
        except (ValueError, EOFError):
            shutil.rmtree(folder, ignore_errors=True)
            continue
        if index["key"].tobytes() == key:
            with contextlib.suppress(OSError):
                os.utime(folder)
            return index
    return None


def _scan(files: list[Path], *, stats: np.ndarray, of: Path) -> dict[str, np.ndarray]:
    """The arrays of `index_archives`."""
    with _progress(int(stats[:, 0].sum()), of=of) as advance, ThreadPoolExecutor(THREADS) as pool:
        by_file = list(pool.map(lambda file: _folders(file, advance=advance), files))
    folders = [folder for file_folders in by_file for folder in file_folders]
    if not folders:
        raise UserError(f"data.path: '{of}' contains no image, neither in folders nor in tar files inside it")
    return {
        "blob": np.frombuffer(b"".join(folder.blob for folder in folders), dtype=np.uint8),
        "offsets": offsets_from(np.concatenate([folder.lengths for folder in folders])),
        "ranges": np.concatenate([folder.ranges for folder in folders]),
        "starts": offsets_from(np.array([len(folder.lengths) for folder in folders])),
        "archives": np.repeat(np.arange(len(files), dtype=np.int32), [len(folders) for folders in by_file]),
        "stats": stats,
    }


def _folders(path: Path, *, advance: ProgressCallback) -> list[ArchiveFolder]:
    """The folders of one archive; `advance` is called with the number of bytes since its last call."""
    position = 0

    def report(reached: int) -> None:
        nonlocal position
        advance(reached - position)
        position = reached

    try:
        with open(path, "rb") as file:
            start = file.read(6)
            for magic, command in COMPRESSED.items():
                if start.startswith(magic):
                    raise UserError(
                        f"data.path: '{path}' is compressed, so single images cannot be read from it; decompress it "
                        f"({command})"
                    )
            file.seek(0)
            read = zip_folders if path.suffix.lower() == ".zip" else tar_folders
            folders = read(file, report=report)
            report(file.seek(0, os.SEEK_END))
            return folders
    except UserError:
        raise
    except Exception as error:  # the standard library raises many kinds of errors for damaged tables
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"data.path: '{path}' is not a readable {path.suffix[1:]} file ({reason}); copy or download it again"
        ) from error


def tar_folders(file: IO[bytes], *, report: ProgressCallback, below: str = "", start: int = 0) -> list[ArchiveFolder]:
    """The folders of a tar that starts at byte `start` of its archive; a tar inside it counts as a folder."""
    ranges: dict[str, dict[str, ByteRange]] = {}
    nested_folders: list[ArchiveFolder] = []
    links: list[tarfile.TarInfo] = []
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in _members(tar, report=lambda reached: report(start + reached)):
            folder, name = split_path(member.name, below=below)
            if member.isreg() and name.lower().endswith(".tar"):
                nested = tar.extractfile(member)
                assert nested is not None
                nested_path = os.path.join(folder, name[: -len(".tar")])
                nested_start = start + member.offset_data
                nested_folders += tar_folders(nested, report=report, below=nested_path, start=nested_start)
            elif member.isreg() and is_image(name):
                ranges.setdefault(folder, {})[name] = (start + member.offset_data, member.size, -1)
            elif member.islnk() and is_image(name):
                links.append(member)
    for link in links:  # a hard link: another name of an earlier image
        folder, name = split_path(link.linkname, below=below)
        if name in ranges.get(folder, {}):
            link_folder, link_name = split_path(link.name, below=below)
            ranges.setdefault(link_folder, {})[link_name] = ranges[folder][name]
    return [*_archive_folders(ranges), *nested_folders]


def _members(tar: tarfile.TarFile, *, report: ProgressCallback) -> Iterator[tarfile.TarInfo]:
    """The members of a tar. Raises `TarError` if it is damaged."""
    assert tar.fileobj is not None
    for count in itertools.count():
        member = tar.next()
        if member is None:
            break
        if member.issparse() and is_image(os.path.basename(member.name)):
            raise tarfile.TarError(f"'{member.name}' is stored as a sparse file")
        if count % PROGRESS_INTERVAL == 0:
            report(member.offset)
        yield member
        tar.members.clear()  # type: ignore[attr-defined]  # otherwise it keeps an object for each of a million members
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(BLOCK)
    if end.strip(b"\0"):  # tarfile treats a damaged header as the end
        raise tarfile.TarError(f"damaged at byte {tar.offset}")
    if len(end) < BLOCK:  # and the end of the file as that of the tar
        raise tarfile.TarError(f"truncated at byte {tar.offset}")


def zip_folders(file: IO[bytes], *, report: ProgressCallback) -> list[ArchiveFolder]:
    """The folders of a zip. Raises `UserError` if it is encrypted."""
    ranges: dict[str, dict[str, ByteRange]] = {}
    with zipfile.ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    for count, entry in enumerate(entries):
        if count % PROGRESS_INTERVAL == 0:
            report(entry.header_offset)
        folder, name = split_path(_zip_name(entry))
        if not entry.is_dir() and is_image(name) and not stat.S_ISLNK(entry.external_attr >> 16):
            ranges.setdefault(folder, {})[name] = _zip_range(entry, file)
    return _archive_folders(ranges)


def _zip_name(entry: zipfile.ZipInfo) -> str:
    name = entry.filename
    if not entry.flag_bits & UTF8_NAME:
        with contextlib.suppress(UnicodeError):  # Info-ZIP writes UTF-8 without this flag
            name = name.encode("cp437").decode()
    return name.replace("\\", "/")  # written by some Windows programs


def _zip_range(entry: zipfile.ZipInfo, file: IO[bytes]) -> ByteRange:
    if entry.flag_bits & ENCRYPTED:
        raise UserError(f"data.path: '{file.name}' is encrypted; extract it with its password and use data=folder")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(
            f"data.path: '{file.name}' uses compression method {entry.compress_type}; expected 0 (stored) or 8 "
            "(deflated), so create it again with zip -0"
        )
    header = os.pread(file.fileno(), LOCAL_HEADER.size, entry.header_offset)
    if len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
        raise zipfile.BadZipFile(f"'{entry.filename}' is not at its position in the table")
    # The table at the end repeats the extra field, but its length may differ from the one here.
    start = entry.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(header))
    if start + entry.compress_size > os.fstat(file.fileno()).st_size:
        raise zipfile.BadZipFile(f"'{entry.filename}' extends beyond the end of the file")
    return start, entry.compress_size, -1 if entry.compress_type == zipfile.ZIP_STORED else entry.file_size


def split_path(path: str, *, below: str = "") -> tuple[str, str]:
    """Folder and name of a member; both empty for hidden members and for metadata of macOS."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    if not parts or any(part.startswith(".") or part == "__MACOSX" for part in parts):
        return "", ""
    return "/".join([below, *parts[:-1]] if below else parts[:-1]), parts[-1]


def _archive_folders(ranges: dict[str, dict[str, ByteRange]]) -> list[ArchiveFolder]:
    folders = []
    for path, images in ranges.items():
        names = sorted(images)
        paths = [os.fsencode(os.path.join(path, name)) for name in names]
        lengths = np.fromiter(map(len, paths), dtype=np.int64, count=len(paths))
        folders.append(ArchiveFolder(b"".join(paths), lengths, np.array([images[n] for n in names], dtype=np.int64)))
    return folders


@contextlib.contextmanager
def _progress(total: int, *, of: Path) -> Iterator[ProgressCallback]:
    """The function to call with every number of bytes read; after a second, it shows a bar or, in a log, one line."""
    console = Console(stderr=True, force_jupyter=False)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(f"listing the images in {escape(str(of))}", total=total)
    lock, show_time = threading.Lock(), time.monotonic() + PROGRESS_DELAY_S
    visible = False

    def advance(count: int) -> None:
        nonlocal visible
        bar.advance(task, count)
        with lock:
            if visible or time.monotonic() < show_time:
                return
            visible = True
        if console.is_terminal:
            bar.start()
        else:
            console.print(f"listing the images in {of}", highlight=False, markup=False)

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
