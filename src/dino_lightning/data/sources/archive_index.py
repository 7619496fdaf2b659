"""Where the images lie inside zip and tar files: read once, kept in `data.cache_dir` where that takes long.

A tar has no table of contents: its headers are found one after the other, which takes minutes for a terabyte. A zip has
one at its end, but only the header beside an entry says where its data begins.
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
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from dino_lightning.data.sources.base import content_digest
from dino_lightning.data.sources.file_index import is_image
from dino_lightning.data.sources.mapped_arrays import MappedArrays, offsets_of, open_stored, store
from dino_lightning.errors import UserError

KEPT_FROM = 100_000_000
"""Bytes of all archives from which on the table is kept."""
FORMAT = b"1"
"""Changes when a kept table would be read wrongly."""
THREADS = 8
"""Archives that are read at once: on a network file system each header costs a round trip."""
STEP = 256
"""Members between two reports of the progress."""
BLOCK = 512
"""A tar is made of blocks of this many bytes; one of zeros ends it."""
ENCRYPTED, UTF8_NAME = 1 << 0, 1 << 11
"""Flags of a zip entry."""
LOCAL_HEADER = struct.Struct("<26xHH")
"""The header before a zip entry's data: what follows it are a name and an extra field of these lengths."""
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
"""First bytes of a compressed file -> the command that decompresses it."""

ByteRange = tuple[int, int, int]
"""Where an image's data begins in its archive, how long it is there, and its length unpacked, -1 where it is not packed
(bytes)."""
Report = Callable[[int], None]
"""Called with the position reached in an archive (bytes)."""


@dataclass
class ArchiveFolder:
    """The images of one folder in an archive, by name; each path in the archive is a piece of `blob`."""

    path: str
    blob: bytes
    lengths: np.ndarray
    """Lengths of the paths (n,) int64."""
    places: np.ndarray
    """(n, 3) int64, the `Place` of each."""


def read_members(files: list[Path], *, of: Path, cache_dir: str) -> MappedArrays:
    """The images inside the archives `files`, folder by folder.

    `blob` and `offsets` hold their paths inside the archive, `places` (n, 3) where their data is. A folder's images are
    the rows from `starts[i]` to `starts[i + 1]`, by name, of the archive `archives[i]`. `states` (files, 2) are sizes
    and times of the archives. The table is kept for `of`, until one of the archives changes.
    """
    states = np.array([(status.st_size, status.st_mtime_ns) for status in map(os.stat, files)], dtype=np.int64)
    if states[:, 0].sum() < KEPT_FROM:
        return MappedArrays(_scan(files, states=states, of=of))
    key = content_digest(FORMAT, *(os.fsencode(file) for file in files), states.tobytes()).encode()
    place = Path(cache_dir).expanduser() / "archives" / content_digest(os.fsencode(of))
    known = _known(place, key=key)
    if known is None:
        with _alone(place):  # whoever waited finds the other's table
            known = _known(place, key=key)
            if known is None:
                arrays = _scan(files, states=states, of=of)
                known = store({**arrays, "key": np.frombuffer(key, dtype=np.uint8)}, under=place)
    return known


def _known(place: Path, *, key: bytes) -> MappedArrays | None:
    """The kept table with this key, marked as used. Damaged tables are removed."""
    for folder in place.glob("[!.]*/"):  # hidden ones are being written
        try:
            kept = open_stored(folder)
            count = len(kept["places"])
            if (len(kept["offsets"]), kept["offsets"][-1], kept["starts"][-1]) != (count + 1, len(kept["blob"]), count):
                raise ValueError(f"'{folder}' is not a table of members")
        except OSError:
            continue
        except (ValueError, EOFError, KeyError):
            shutil.rmtree(folder, ignore_errors=True)
            continue
        if kept["key"].tobytes() == key:
            with contextlib.suppress(OSError):
                os.utime(folder)
            return kept
    return None


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """One process at a time, where the cache can be written."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):  # the latter: a file system without locks
            place.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(place / "lock"))
        yield


def _scan(files: list[Path], *, states: np.ndarray, of: Path) -> dict[str, np.ndarray]:
    """The arrays of `read_members`."""
    with _progress(int(states[:, 0].sum()), of=of) as moved, ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda file: _folders(file, moved=moved), files))
    folders = [folder for one in found for folder in one]
    if not folders:
        raise UserError(f"data.path: '{of}' holds no image, neither in folders nor in tar files inside")
    return {
        "blob": np.frombuffer(b"".join(folder.blob for folder in folders), dtype=np.uint8),
        "offsets": offsets_of(np.concatenate([folder.lengths for folder in folders])),
        "places": np.concatenate([folder.places for folder in folders]),
        "starts": offsets_of(np.array([len(folder.lengths) for folder in folders])),
        "archives": np.repeat(np.arange(len(files), dtype=np.int32), [len(one) for one in found]),
        "states": states,
    }


def _folders(path: Path, *, moved: Report) -> list[ArchiveFolder]:
    """The folders of one archive; `moved` is told how many bytes were passed."""
    position = 0

    def report(reached: int) -> None:
        nonlocal position
        moved(reached - position)
        position = reached

    try:
        with open(path, "rb") as file:
            _check_start(path, file.read(6))
            file.seek(0)
            read = zip_folders if path.suffix.lower() == ".zip" else tar_folders
            folders = read(file, report=report)
            report(file.seek(0, os.SEEK_END))
            return folders
    except UserError:
        raise
    except Exception as error:  # the standard library stumbles over damaged tables in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"data.path: '{path}' is not a {path.suffix[1:]} file that can be read ({reason}); copy or download it "
            "again"
        ) from error


def _check_start(path: Path, start: bytes) -> None:
    for magic, command in COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"data.path: '{path}' is compressed, so it cannot be read from the middle; decompress it ({command})"
            )


def tar_folders(file: IO[bytes], *, report: Report, below: str = "", begin: int = 0) -> list[ArchiveFolder]:
    """The folders of a tar that begins at byte `begin` of its archive; a tar inside it counts as a folder."""
    found: dict[str, dict[str, ByteRange]] = {}
    inside: list[ArchiveFolder] = []
    links: list[tarfile.TarInfo] = []
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in _members(tar, report=lambda reached: report(begin + reached)):
            folder, name = split_path(member.name, below=below)
            if member.isreg() and name.lower().endswith(".tar"):
                nested = tar.extractfile(member)
                assert nested is not None
                deeper = os.path.join(folder, name[: -len(".tar")])
                inside += tar_folders(nested, report=report, below=deeper, begin=begin + member.offset_data)
            elif member.isreg() and is_image(name):
                found.setdefault(folder, {})[name] = (begin + member.offset_data, member.size, -1)
            elif member.islnk() and is_image(name):
                links.append(member)
    for link in links:  # a further name of an image that was packed before
        folder, name = split_path(link.linkname, below=below)
        if name in found.get(folder, {}):
            other, alias = split_path(link.name, below=below)
            found.setdefault(other, {})[alias] = found[folder][name]
    return [*_packed(found), *inside]


def _members(tar: tarfile.TarFile, *, report: Report) -> Iterator[tarfile.TarInfo]:
    """The members of a tar. Raises `TarError` where it is damaged."""
    assert tar.fileobj is not None
    for count in itertools.count():
        member = tar.next()
        if member is None:
            break
        if member.issparse() and is_image(os.path.basename(member.name)):
            raise tarfile.TarError(f"'{member.name}' is stored as a sparse file")
        if count % STEP == 0:
            report(member.offset)
        yield member
        tar.members.clear()  # type: ignore[attr-defined]  # else it holds an object for each of a million members
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(BLOCK)
    if end.strip(b"\0"):  # tarfile takes a damaged header for the end
        raise tarfile.TarError(f"damaged at byte {tar.offset}")
    if len(end) < BLOCK:  # and the end of the file for that of the tar
        raise tarfile.TarError(f"cut off at byte {tar.offset}")


def zip_folders(file: IO[bytes], *, report: Report) -> list[ArchiveFolder]:
    """The folders of a zip. Raises `UserError` for an encrypted one."""
    found: dict[str, dict[str, ByteRange]] = {}
    with zipfile.ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    for count, entry in enumerate(entries):
        if count % STEP == 0:
            report(entry.header_offset)
        folder, name = split_path(_zip_name(entry))
        if not entry.is_dir() and is_image(name) and not stat.S_ISLNK(entry.external_attr >> 16):
            found.setdefault(folder, {})[name] = _zip_place(entry, file)
    return _packed(found)


def _zip_name(entry: zipfile.ZipInfo) -> str:
    name = entry.filename
    if not entry.flag_bits & UTF8_NAME:
        with contextlib.suppress(UnicodeError):  # Info-ZIP writes UTF-8 without saying so
            name = name.encode("cp437").decode()
    return name.replace("\\", "/")  # as some programs of Windows write it


def _zip_place(entry: zipfile.ZipInfo, file: IO[bytes]) -> ByteRange:
    if entry.flag_bits & ENCRYPTED:
        raise UserError(f"data.path: '{file.name}' is encrypted; unpack it with its password and take data=folder")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(
            f"data.path: '{file.name}' is packed by method {entry.compress_type}, only 0 (stored) and 8 (deflated) can "
            "be read; pack it again with zip -0"
        )
    header = os.pread(file.fileno(), LOCAL_HEADER.size, entry.header_offset)
    if len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
        raise zipfile.BadZipFile(f"'{entry.filename}' is not where its table says")
    # The table repeats name and extra field, but the latter's length may differ from the one here.
    begin = entry.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(header))
    if begin + entry.compress_size > os.fstat(file.fileno()).st_size:
        raise zipfile.BadZipFile(f"'{entry.filename}' reaches beyond the end")
    return begin, entry.compress_size, -1 if entry.compress_type == zipfile.ZIP_STORED else entry.file_size


def split_path(path: str, *, below: str = "") -> tuple[str, str]:
    """Folder and name of a member; both empty for a hidden one and for what macOS adds."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    if not parts or any(part.startswith(".") or part == "__MACOSX" for part in parts):
        return "", ""
    return "/".join([below, *parts[:-1]] if below else parts[:-1]), parts[-1]


def _packed(found: dict[str, dict[str, ByteRange]]) -> list[ArchiveFolder]:
    folders = []
    for path, images in found.items():
        names = sorted(images)
        paths = [os.fsencode(os.path.join(path, name)) for name in names]
        lengths = np.fromiter(map(len, paths), dtype=np.int64, count=len(paths))
        places = np.array([images[name] for name in names], dtype=np.int64)
        folders.append(ArchiveFolder(path, b"".join(paths), lengths, places))
    return folders


@contextlib.contextmanager
def _progress(total: int, *, of: Path) -> Iterator[Report]:
    """What to call with every number of bytes passed; after a second, a bar or, in a log, one line is shown."""
    console = Console(stderr=True, force_jupyter=False)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(f"listing the images in {escape(str(of))}", total=total)
    lock, shows_at = threading.Lock(), time.monotonic() + 1
    shown = False

    def moved(count: int) -> None:
        nonlocal shown
        bar.advance(task, count)
        with lock:
            if shown or time.monotonic() < shows_at:
                return
            shown = True
        if console.is_terminal:
            bar.start()
        else:
            console.print(f"listing the images in {of}", highlight=False, markup=False)

    try:
        yield moved
    finally:
        if bar.live.is_started:
            bar.stop()
