"""Images inside zip and tar files, read in place: nothing is unpacked.

The layout is recognized as that of a folder is (`sources.folder`), from the folders inside the archive; a single folder
around everything does not count, and a tar inside an archive counts as a folder of its name (ImageNet's training
images come as a tar of one tar per class). A folder of two or more archives is read as if each were a folder: they are
the splits where one is named like `train.zip` or `ILSVRC2012_img_train.tar`, classes otherwise (ImageNet-22k).
"""

import os
import re
import zlib
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import NoReturn, TypeAlias

import numpy as np

from dino_lightning.config import ArchiveData
from dino_lightning.data.sources.archive_index import read_members
from dino_lightning.data.sources.base import Splits, content_digest
from dino_lightning.data.sources.folder import VAL_NAMES, existing_path
from dino_lightning.data.sources.mapped_arrays import MappedArrays, Paths, offsets_of
from dino_lightning.errors import UserError, did_you_mean

ENDINGS = (".zip", ".tar")
COMPRESSED_TAR = re.compile(r"\.(tar\.\w+|t(gz|xz|bz2?|zst))$", re.IGNORECASE)
SPLIT_NAME = re.compile(rf"(?<![a-z])(train|{'|'.join(VAL_NAMES)})(?![a-z])", re.IGNORECASE)
"""Where an archive's name says which split it is."""
OPEN_FILES = 128
"""Archives that a process keeps open; many systems allow 1024 files, and ImageNet-22k has 21,841 archives."""


class ArchiveImages:
    """The images of some folders inside archives; `folders` are their numbers in `members` (see `read_members`).

    `labels` has a class for each folder; None for no labels.
    """

    def __init__(
        self,
        files: list[str],
        *,
        members: MappedArrays,
        folders: np.ndarray,
        labels: np.ndarray | None,
        classes: list[str] | None,
    ):
        self.files = files
        self.members = members
        self.folders, self._folder_labels = folders, labels
        self.classes = classes
        self._expand()

    def _expand(self) -> None:
        starts = self.members["starts"]
        counts = np.diff(starts)[self.folders]
        before = offsets_of(counts)
        self._rows = np.repeat(starts[self.folders] - before[:-1], counts) + np.arange(before[-1])
        self.labels = None if self._folder_labels is None else np.repeat(self._folder_labels, counts)

    def __getstate__(self) -> dict[str, object]:
        # Whoever unpickles it makes the large arrays anew.
        return {name: value for name, value in vars(self).items() if name not in ("_rows", "labels")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._expand()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> bytes:
        """The file. Raises `OSError` where the archive has changed or is damaged."""
        row = self._rows[index]
        archive = self._archive(row)
        begin, length, unpacked = self.members["places"][row].tolist()
        size, time = self.members["states"][archive].tolist()
        file = opened(self.files[archive], size=size, time=time, process=os.getpid())
        content = file.read(begin, length)
        return content if unpacked < 0 else _unpack(content, length=unpacked)

    def describe(self, index: int) -> str:
        """Path of the archive and path in it."""
        row = self._rows[index]
        return os.path.join(self.files[self._archive(row)], Paths(self.members)[row])

    def fingerprint(self) -> str:
        """Of the archives' names, sizes and times, and of the folders."""
        names = (os.fsencode(file) for file in self.files)
        return content_digest(*names, self.members["states"].tobytes(), self.folders.tobytes())

    def _archive(self, row: int) -> int:
        return int(self.members["archives"][np.searchsorted(self.members["starts"], row, side="right") - 1])


class OpenFile:
    """A file to read from at any place, also by several threads; closed when nobody holds it any more."""

    def __init__(self, path: str):
        self.path, self.number = path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, begin: int, length: int) -> bytes:
        """`length` bytes from `begin` on. Raises `OSError` where there are fewer."""
        content = os.pread(self.number, length, begin)
        while len(content) < length:  # a signal, or more than the system reads at once
            more = os.pread(self.number, length - len(content), begin + len(content))
            if not more:
                raise OSError(f"'{self.path}' ends before byte {begin + length}")
            content += more
        return content

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at exit, `os` may be gone before
        if hasattr(self, "number"):
            close(self.number)


@lru_cache(maxsize=OPEN_FILES)
def opened(path: str, *, size: int, time: int, process: int) -> OpenFile:
    """The file, opened by this `process` itself. Raises `OSError` where its size or time (ns) is another by now."""
    del process
    file = OpenFile(path)
    status = os.fstat(file.number)
    if (status.st_size, status.st_mtime_ns) != (size, time):
        raise OSError(f"'{path}' has changed since the images in it were listed; start again")
    return file


def _unpack(content: bytes, *, length: int) -> bytes:
    try:
        unpacked = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, length + 1)
    except zlib.error as error:
        raise OSError(f"damaged in the archive ({error})") from error
    if len(unpacked) != length:
        raise OSError(f"damaged in the archive ({len(unpacked)} bytes instead of {length})")
    return unpacked


def open_archive(config: ArchiveData) -> Splits:
    """Training images, validation images where there are labeled ones, and what the user should know."""
    root = existing_path(config.path, files=True)
    files = archive_files(root)
    members = read_members(files, of=root, cache_dir=config.cache_dir)
    tree = folder_tree(files, members=members)
    build = partial(_images, files=[str(file) for file in files], members=members)
    tops = {_top(path) for path in tree.values()}
    if "train" in tops:
        return _open_splits(root, tree, build=build)
    if tops <= set(VAL_NAMES):
        raise UserError(f"data.path={config.path} has '{min(tops)}' but no 'train'; add it or give one archive only")
    classes, notice = _classes(tree, where=str(root))
    return Splits(build(tree, classes=classes), None, notice)


def archive_files(root: Path) -> list[Path]:
    """The archive itself, or those in a folder, by name."""
    if root.is_file():
        files = [root] if _is_archive(root.name) else []
    else:
        files = sorted(path for path in root.iterdir() if _is_archive(path.name) and path.is_file())
    if not files:
        verb = "is" if root.is_file() else "holds"
        raise UserError(f"data.path: '{root}' {verb} no .zip or .tar; for image files take data=folder")
    return files


def _is_archive(name: str) -> bool:
    # Compressed ones count, so that they are refused rather than passed over.
    return not name.startswith(".") and (name.lower().endswith(ENDINGS) or bool(COMPRESSED_TAR.search(name)))


Tree: TypeAlias = dict[int, str]
"""Number of a folder in the table of members -> its path in the folder that the archives stand for."""


def folder_tree(files: list[Path], *, members: MappedArrays) -> Tree:
    """Each folder inside the archives, below the split or class that its archive is if there are several."""
    paths, starts = Paths(members), members["starts"]
    inside: dict[int, Tree] = {}
    for number, archive in enumerate(members["archives"].tolist()):
        inside.setdefault(archive, {})[number] = os.path.dirname(paths[int(starts[number])])
    return {
        number: "/".join(filter(None, (_prefix(files, archive), path)))
        for archive, tree in inside.items()
        for number, path in _without_top(tree).items()
    }


def _without_top(tree: Tree) -> Tree:
    """Without the single folder around all others, if there is one."""
    tops = {_top(path) for path in tree.values()}
    return {number: path.partition("/")[2] for number, path in tree.items()} if len(tops) == 1 else tree


def _prefix(files: list[Path], archive: int) -> str:
    if len(files) == 1:
        return ""
    name = files[archive].stem
    return (_split(name) or name) if any(_split(file.stem) == "train" for file in files) else name


def _split(name: str) -> str | None:
    found = SPLIT_NAME.search(name)
    return found[1].lower() if found else None


def _top(path: str) -> str:
    return path.partition("/")[0]


def _below(tree: Tree, top: str) -> Tree:
    return {number: path.partition("/")[2] for number, path in tree.items() if _top(path) == top}


def _classes(tree: Tree, *, where: str) -> tuple[list[str] | None, str | None]:
    """Sorted class names, or None and the reason why the images count as unlabeled."""
    tops = {_top(path) for path in tree.values()}
    if "" in tops and len(tops) > 1:
        return None, f"no labels: images lie beside the folders in '{where}'"
    if len(tops) < 2:
        return None, f"no labels: '{where}' has {'no class folders' if '' in tops else 'one folder only'}"
    return sorted(tops), None


def _images(tree: Tree, *, classes: list[str] | None, files: list[str], members: MappedArrays) -> ArchiveImages:
    """The images in the order of `FolderImages`: by class, then by path of the folder."""
    label = {name: number for number, name in enumerate(classes or [])}
    folders = sorted(tree, key=lambda number: (label.get(_top(tree[number]), 0), tree[number] or "."))
    labels = None if classes is None else np.array([label[_top(tree[number])] for number in folders], dtype=np.int64)
    return ArchiveImages(files, members=members, folders=np.array(folders), labels=labels, classes=classes)


def _open_splits(root: Path, tree: Tree, *, build: Callable[..., ArchiveImages]) -> Splits:
    tops = {_top(path) for path in tree.values()}
    val_name = next((name for name in VAL_NAMES if name in tops), None)
    train, others = _below(tree, "train"), tops - {"train", *VAL_NAMES}
    classes, notice = _classes(train, where=f"{root}: train")
    val = None
    if val_name and classes:
        val = _below(tree, val_name)
        found = {_top(path) for path in val.values()}
        if not found & set(classes):  # ImageNet's validation images come without folders
            val = None
        elif found != set(classes):
            _refuse_classes(root, set(classes), found, val_name=val_name)
    if val_name and val is None:
        others.add(val_name)
    if others:
        beside = f"beside 'train' in '{root}', not used: {', '.join(sorted(others)[:5])}{', …' * (len(others) > 5)}"
        notice = f"{notice}; {beside}" if notice else beside
    return Splits(build(train, classes=classes), build(val, classes=classes) if val else None, notice)


def _refuse_classes(root: Path, train: set[str], val: set[str], *, val_name: str) -> NoReturn:
    for present, missing, here, there in (("train", val_name, train, val), (val_name, "train", val, train)):
        if here - there:
            name = min(here - there)
            raise UserError(
                f"data.path={root}: the class folder '{name}' is in '{present}' but not in '{missing}' "
                f"({len(here - there)} such); {did_you_mean(name, there)}"
            )
    raise AssertionError("the classes are the same")
