"""Image files on disk: `train/` and `val/`, or class folders, or a flat folder without labels.

The layout is recognized from the folder names alone, before any file is listed:

    path/train[/class]/…   and path/val, path/validation or path/test   the splits
    path/class/…                                                        class folders, no validation split
    path/…                                                              no labels

Classes are first-level folders, and images may lie at any depth below them, as in torchvision's `ImageFolder`; the
order of the images is its order too. Hidden files and folders do not count.
"""

import os
from itertools import islice
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from dino_lightning.config import FolderData
from dino_lightning.config.paths import usable_path
from dino_lightning.data.sources.base import Splits
from dino_lightning.data.sources.file_index import folder_contents, index_files
from dino_lightning.data.sources.mapped_arrays import files_digest
from dino_lightning.errors import UserError, did_you_mean

VAL_NAMES = ("val", "validation", "test")
"""Names of a validation split, in the order in which they are looked for."""
MOST_NAMES = 1000
"""Names of a folder that are compared with a misspelt one."""


class FolderImages:
    """The images below `root`, labeled by their first-level folder; `classes=None` takes all of them without labels.

    The list of a large folder is kept in `cache_dir`, see `index`.
    """

    def __init__(self, root: Path, *, classes: list[str] | None, cache_dir: str):
        self.root = str(root)
        self.classes = classes
        self.index = index_files(root, below=[""] if classes is None else classes, cache_dir=cache_dir)
        if classes is not None:
            self._check_classes(np.bincount(self.index.groups, minlength=len(classes)))
        elif not len(self):
            raise UserError(f"data.path: '{root}' holds no image ({extensions()} are looked for, at any depth)")

    @property
    def labels(self) -> np.ndarray | None:
        """Number of the first-level folder (n,) int64, or None."""
        return None if self.classes is None else self.index.groups

    def __len__(self) -> int:
        return len(self.index.paths)

    def read(self, index: int) -> bytes:
        """The file."""
        with open(self.describe(index), "rb") as file:
            return file.read()

    def describe(self, index: int) -> str:
        """Path of the file."""
        return os.path.join(self.root, self.index.paths[index])

    def fingerprint(self) -> str:
        """Of the files' paths, sizes and times."""
        paths = self.index.paths
        return files_digest([paths.blob, paths.offsets], files=map(self.describe, range(len(self))))

    def _check_classes(self, counts: np.ndarray) -> None:
        assert self.classes is not None
        for name, count in zip(self.classes, counts, strict=True):
            if not count:
                lack = "cannot be opened" if name in self.index.closed else f"holds no image ({extensions()})"
                raise UserError(
                    f"data.path: the class folder '{os.path.join(self.root, name)}' {lack}; fill it or move it away"
                )


def open_folder(config: FolderData) -> Splits:
    """Training images, validation images where there are labeled ones, and what the user should know."""
    root = existing_path(config.path)
    if not root.is_dir():
        raise UserError(f"data.path={config.path} is a file; give the folder of the images")
    folders, has_image = folder_contents(root, cache_dir=config.cache_dir)
    val_name = next((name for name in VAL_NAMES if name in folders), None)
    if "train" in folders:
        others = [name for name in folders if name not in ("train", *VAL_NAMES)]
        return _open_splits(root, val_name=val_name, others=others, cache_dir=config.cache_dir)
    if val_name and set(folders) <= set(VAL_NAMES):
        raise UserError(f"data.path={config.path} has '{val_name}/' but no 'train/'; add it or give the folder itself")
    classes, notice = class_folders(root, folders=folders, has_image=has_image)
    train = FolderImages(root, classes=classes, cache_dir=config.cache_dir)
    return Splits(train, None, _join(notice, train.index.notice()))


def _open_splits(root: Path, *, val_name: str | None, others: list[str], cache_dir: str) -> Splits:
    folders, has_image = folder_contents(root / "train", cache_dir=cache_dir)
    classes, notice = class_folders(root / "train", folders=folders, has_image=has_image)
    if val_name and classes is None:
        others = [*others, val_name]
    elif val_name and classes is not None:
        _check_same_classes(root, classes, val_name=val_name)
    if others:
        named = f"{', '.join(sorted(others)[:5])}{', …' * (len(others) > 5)}"
        notice = _join(notice, f"beside '{root / 'train'}', not used: {named}")
    train = FolderImages(root / "train", classes=classes, cache_dir=cache_dir)
    val = None
    if val_name and classes is not None:
        val = FolderImages(root / val_name, classes=classes, cache_dir=cache_dir)
    return Splits(train, val, _join(notice, train.index.notice(), val.index.notice() if val else None))


def class_folders(root: Path, *, folders: list[str], has_image: bool) -> tuple[list[str] | None, str | None]:
    """Class names of what lies in `root`, or None and the reason why the images count as unlabeled."""
    if len(folders) < 2:
        return None, f"no labels: '{root}' has {'one folder only' if folders else 'no class folders'}"
    if has_image:
        return None, f"no labels: images lie beside the folders of '{root}'"
    return folders, None


def _check_same_classes(root: Path, train: list[str], *, val_name: str) -> None:
    val = subfolders(root / val_name)
    if not val:
        raise UserError(
            f"data.path: '{root / 'train'}' has class folders but '{root / val_name}' has none; "
            f"sort its images into the folders {', '.join(train[:3])}, …"
        )
    for present, missing, names in (
        ("train", val_name, set(train) - set(val)),
        (val_name, "train", set(val) - set(train)),
    ):
        if names:
            name = min(names)
            others = val if missing == val_name else train
            raise UserError(
                f"data.path: the class folder '{name}' is in '{root / present}' but not in '{root / missing}' "
                f"({len(names)} such); {did_you_mean(name, others)}"
            )


def subfolders(root: Path) -> list[str]:
    """Sorted names of the folders directly under `root`, hidden ones left out."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def existing_path(path: str, *, key: str = "data.path", files: bool = False) -> Path:
    """The path of a setting with `~` expanded. Raises `UserError` with the closest name beside the first missing part.

    With `files`, files are offered too where only the last part is missing.
    """
    wanted = usable_path(key, path).absolute()
    if wanted.exists():
        return wanted
    lost = next(part for part in (wanted, *wanted.parents) if part.parent.exists())
    folder = lost.parent
    siblings = _names(folder, files=files and lost == wanted) if folder.is_dir() else []
    hint = did_you_mean(lost.name, siblings) if siblings else f"it has no {'files' if files else 'folders'} at all"
    raise UserError(f"{key}={path} does not exist: no '{lost.name}' in '{folder}'; {hint}")


def extensions() -> str:
    """The recognized file name endings, for messages."""
    return ", ".join(IMG_EXTENSIONS)


def _names(folder: Path, *, files: bool) -> list[str]:
    with os.scandir(folder) as entries:
        shown = (entry.name for entry in entries if not entry.name.startswith(".") and (files or entry.is_dir()))
        return sorted(islice(shown, MOST_NAMES))


def _join(*notices: str | None) -> str | None:
    return "; ".join(filter(None, notices)) or None
