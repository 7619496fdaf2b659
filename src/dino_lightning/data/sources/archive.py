"""Images inside zip and tar files, read in place without extraction.

The layout is recognized like that of a folder (`sources.folder`), from the folders inside the archive. A single folder
around everything else is ignored, and a tar inside an archive counts as a folder (ImageNet's training images are a tar
with one tar per class). In a folder with two or more archives, each archive counts as a folder: they are splits if one
is named like `train.zip` or `ILSVRC2012_img_train.tar`, and classes otherwise (ImageNet-22k).
"""

import os
import re
import zlib
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeAlias

import numpy as np

from dino_lightning.config import ArchiveData
from dino_lightning.data.sources.archive_index import index_archives
from dino_lightning.data.sources.base import Splits, content_digest, join_remarks
from dino_lightning.data.sources.folder import (
    VAL_NAMES,
    check_same_classes,
    class_folders,
    existing_path,
    unused_remark,
)
from dino_lightning.data.sources.mapped_arrays import MappedArrays, Paths, offsets_from
from dino_lightning.data.sources.registry import register_source
from dino_lightning.errors import UserError

SUFFIXES = (".zip", ".tar")
COMPRESSED_TAR = re.compile(r"\.(tar\.\w+|t(gz|xz|bz2?|zst))$", re.IGNORECASE)
SPLIT_NAME = re.compile(rf"(?<![a-z])(train|{'|'.join(VAL_NAMES)})(?![a-z])", re.IGNORECASE)
"""The split in the name of an archive."""
MAX_OPEN_FILES = 128
"""Archives that a process keeps open; many systems allow 1024 files, and ImageNet-22k has 21,841 archives."""


class ArchiveImages:
    """The images of some folders inside archives; `folders` are their numbers in `index` (see `index_archives`).

    `labels` contains a class for each folder; None for no labels.
    """

    def __init__(
        self,
        files: list[str],
        *,
        index: MappedArrays,
        folders: np.ndarray,
        labels: np.ndarray | None,
        classes: list[str] | None,
    ):
        self.files, self.index, self.folders, self.classes = files, index, folders, classes
        self._folder_labels = labels
        starts = index["starts"]
        counts = np.diff(starts)[folders]
        offsets = offsets_from(counts)
        self._rows = np.repeat(starts[folders] - offsets[:-1], counts) + np.arange(offsets[-1])
        self.labels = None if labels is None else np.repeat(labels, counts)

    def __reduce__(self) -> tuple[Callable[[], "ArchiveImages"], tuple[()]]:
        # The large arrays are computed again after unpickling.
        options = {"index": self.index, "folders": self.folders, "labels": self._folder_labels, "classes": self.classes}
        return partial(ArchiveImages, self.files, **options), ()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> bytes:
        """The bytes of the image file. Raises `OSError` if the archive has changed or is damaged."""
        row = self._rows[index]
        archive = self._archive(row)
        start, length, uncompressed = self.index["ranges"][row].tolist()
        size, time = self.index["stats"][archive].tolist()
        content = opened(self.files[archive], size=size, time=time, process=os.getpid()).read(start, length)
        return content if uncompressed < 0 else _decompress(content, length=uncompressed)

    def describe(self, index: int) -> str:
        """Path of the archive and path in it."""
        row = self._rows[index]
        return os.path.join(self.files[self._archive(row)], Paths(self.index)[row])

    def fingerprint(self) -> str:
        """Digest of the archives' names, sizes and times, and of the folders."""
        names = (os.fsencode(file) for file in self.files)
        return content_digest(*names, self.index["stats"].tobytes(), self.folders.tobytes())

    def _archive(self, row: int) -> int:
        return int(self.index["archives"][np.searchsorted(self.index["starts"], row, side="right") - 1])


class OpenFile:
    """A file for random reads, also from several threads; closed when it is garbage collected."""

    def __init__(self, path: str):
        self.path, self.descriptor = path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start` on. Raises `OSError` if there are fewer."""
        content = os.pread(self.descriptor, length, start)
        while len(content) < length:  # after a signal, or for more than the system reads in one call
            chunk = os.pread(self.descriptor, length - len(content), start + len(content))
            if not chunk:
                raise OSError(f"'{self.path}' ends before byte {start + length}")
            content += chunk
        return content

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may already be unloaded at exit
        if hasattr(self, "descriptor"):
            close(self.descriptor)


@lru_cache(maxsize=MAX_OPEN_FILES)
def opened(path: str, *, size: int, time: int, process: int) -> OpenFile:
    """The file, opened once per `process`. Raises `OSError` if its size or time (ns) has changed."""
    del process
    file = OpenFile(path)
    status = os.fstat(file.descriptor)
    if (status.st_size, status.st_mtime_ns) != (size, time):
        raise OSError(f"'{path}' has changed since its images were listed; restart the run")
    return file


def _decompress(content: bytes, *, length: int) -> bytes:
    try:
        decompressed = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, length + 1)
    except zlib.error as error:
        raise OSError(f"damaged in the archive ({error})") from error
    if len(decompressed) != length:
        raise OSError(f"damaged in the archive ({len(decompressed)} bytes instead of {length})")
    return decompressed


@register_source("archive", ArchiveData)
def open_archive(config: ArchiveData) -> Splits:
    """Training images, and validation images if there are labeled ones."""
    root = existing_path(config.path, files=True)
    files = archive_files(root)
    index = index_archives(files, of=root, cache_dir=config.cache_dir)
    folders = folder_paths(files, index=index)
    build = partial(_images, files=[str(file) for file in files], index=index)
    tops = _tops(folders)
    if "train" in tops:
        return _open_splits(root, folders, build=build)
    if tops <= set(VAL_NAMES):
        raise UserError(
            f"data.path={config.path} has '{min(tops)}' but no 'train'; add 'train' or choose a single archive"
        )
    classes, remark = _classes(folders, root=str(root))
    return Splits(build(folders, classes=classes), None, remark)


def archive_files(root: Path) -> list[Path]:
    """The archive itself, or the archives in a folder, sorted by name."""
    if root.is_file():
        files = [root] if _is_archive(root.name) else []
    else:
        files = sorted(path for path in root.iterdir() if _is_archive(path.name) and path.is_file())
    if not files:
        problem = "is not a .zip or .tar" if root.is_file() else "contains no .zip or .tar"
        raise UserError(f"data.path: '{root}' {problem}; for image files use data=folder")
    return files


def _is_archive(name: str) -> bool:
    # Compressed tars count, so that they cause an error instead of being ignored.
    return not name.startswith(".") and (name.lower().endswith(SUFFIXES) or bool(COMPRESSED_TAR.search(name)))


FolderPaths: TypeAlias = dict[int, str]
"""Number of a folder in the index -> its path, relative to the root that all archives together stand for."""


def folder_paths(files: list[Path], *, index: MappedArrays) -> FolderPaths:
    """The folders inside the archives; with several archives, below the split or class that the archive stands for."""
    paths, starts = Paths(index), index["starts"]
    by_archive: dict[int, FolderPaths] = {}
    for number, archive in enumerate(index["archives"].tolist()):
        by_archive.setdefault(archive, {})[number] = os.path.dirname(paths[int(starts[number])])
    return {
        number: "/".join(filter(None, (_prefix(files, archive), path)))
        for archive, folders in by_archive.items()
        for number, path in _without_common_top(folders).items()
    }


def _without_common_top(folders: FolderPaths) -> FolderPaths:
    """Without the single folder around all others, if there is one."""
    if len(_tops(folders)) > 1:
        return folders
    return {number: path.partition("/")[2] for number, path in folders.items()}


def _prefix(files: list[Path], archive: int) -> str:
    if len(files) == 1:
        return ""
    name = files[archive].stem
    return (_split(name) or name) if any(_split(file.stem) == "train" for file in files) else name


def _split(name: str) -> str | None:
    match = SPLIT_NAME.search(name)
    return match[1].lower() if match else None


def _top(path: str) -> str:
    return path.partition("/")[0]


def _tops(folders: FolderPaths) -> set[str]:
    return {_top(path) for path in folders.values()}


def _below(folders: FolderPaths, top: str) -> FolderPaths:
    return {number: path.partition("/")[2] for number, path in folders.items() if _top(path) == top}


def _classes(folders: FolderPaths, *, root: str) -> tuple[list[str] | None, str | None]:
    """Sorted class names, or None and the reason why the images are treated as unlabeled."""
    tops = _tops(folders)
    names = sorted(tops - {""})
    if "" in tops and names:
        return None, f"no labels: '{root}' contains images next to its folders"
    return class_folders(root, folders=names, has_image=False)


def _images(folders: FolderPaths, *, classes: list[str] | None, files: list[str], index: MappedArrays) -> ArchiveImages:
    """The images in the order of `FolderImages`: by class, then by path of the folder."""
    label = {name: number for number, name in enumerate(classes or [])}
    numbers = sorted(folders, key=lambda number: (label.get(_top(folders[number]), 0), folders[number] or "."))
    labels = None if classes is None else np.array([label[_top(folders[number])] for number in numbers], dtype=np.int64)
    return ArchiveImages(files, index=index, folders=np.array(numbers), labels=labels, classes=classes)


def _open_splits(root: Path, folders: FolderPaths, *, build: Callable[..., ArchiveImages]) -> Splits:
    tops = _tops(folders)
    val_name = next((name for name in VAL_NAMES if name in tops), None)
    train, unused = _below(folders, "train"), tops - {"train", *VAL_NAMES}
    classes, remark = _classes(train, root=f"{root}: train")
    val = None
    if val_name and classes:
        val_folders = _below(folders, val_name)
        val_classes = _tops(val_folders)
        if val_classes & set(classes):  # ImageNet's validation images have no class folders
            check_same_classes(f"data.path={root}", {"train": classes, val_name: val_classes})
            val = build(val_folders, classes=classes)
    if val_name and val is None:
        unused.add(val_name)
    return Splits(build(train, classes=classes), val, join_remarks(remark, unused_remark(root, unused)))
