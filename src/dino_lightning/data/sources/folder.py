"""Image files on disk: `train/` and `val/`, or class folders, or a flat folder without labels.

The layout is recognized from the folder names alone, before any file is listed:

    path/train[/class]/…   and path/val, path/validation or path/test   the splits
    path/class/…                                                        class folders, no validation split
    path/…                                                              no labels

Classes are first-level folders with images at any depth below them, in the order of torchvision's `ImageFolder`. Hidden
files and folders are ignored.
"""

import os
from collections.abc import Collection, Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from dino_lightning.config import FolderData
from dino_lightning.config.paths import usable_path
from dino_lightning.data.sources.base import Splits, join_remarks
from dino_lightning.data.sources.file_index import folder_contents, index_files
from dino_lightning.data.sources.mapped_arrays import ImageFiles
from dino_lightning.data.sources.registry import register_source
from dino_lightning.errors import UserError, did_you_mean

VAL_NAMES = ("val", "validation", "test")
"""Names of a validation split, in order of precedence."""
MAX_SUGGESTIONS = 1000
"""Names in a folder that are compared with a misspelled one."""
EXTENSIONS = ", ".join(IMG_EXTENSIONS)
"""The recognized file name extensions, for messages."""


class FolderImages(ImageFiles):
    """The images below `root`, labeled by their first-level folder; with `classes=None`, all images without labels.

    The list of a large folder is stored in `cache_dir`, see `file_index`.
    """

    def __init__(self, root: Path, *, classes: list[str] | None, cache_dir: str):
        self.index = index_files(root, below=[""] if classes is None else classes, cache_dir=cache_dir)
        super().__init__(root, arrays=self.index.arrays, classes=classes, labels="groups")
        if classes is not None:
            self._check_classes(classes)
        elif not len(self):
            raise UserError(f"data.path: '{root}' contains no image (searched recursively for {EXTENSIONS})")

    def _check_classes(self, classes: list[str]) -> None:
        for name, count in zip(classes, np.bincount(self.arrays["groups"], minlength=len(classes)), strict=True):
            if not count:
                folder = f"data.path: the class folder '{os.path.join(self.root, name)}'"
                if name in self.index.closed:
                    raise UserError(f"{folder} cannot be opened; change its permissions or remove it")
                raise UserError(f"{folder} contains no image ({EXTENSIONS}); add images or remove the folder")


@register_source("folder", FolderData)
def open_folder(config: FolderData) -> Splits:
    """Training images, and validation images if there are labeled ones."""
    root = existing_path(config.path)
    if not root.is_dir():
        raise UserError(f"data.path={config.path} is a file; expected the folder of the images")
    folders, has_image = folder_contents(root, cache_dir=config.cache_dir)
    val_name = next((name for name in VAL_NAMES if name in folders), None)
    if "train" in folders:
        others = [name for name in folders if name not in ("train", *VAL_NAMES)]
        return _open_splits(root, val_name=val_name, others=others, cache_dir=config.cache_dir)
    if val_name and set(folders) <= set(VAL_NAMES):
        raise UserError(
            f"data.path={config.path} has '{val_name}/' but no 'train/'; add 'train/' or choose a folder of images"
        )
    classes, remark = class_folders(root, folders=folders, has_image=has_image)
    train = FolderImages(root, classes=classes, cache_dir=config.cache_dir)
    return Splits(train, None, join_remarks(remark, train.index.remark()))


def _open_splits(root: Path, *, val_name: str | None, others: list[str], cache_dir: str) -> Splits:
    folders, has_image = folder_contents(root / "train", cache_dir=cache_dir)
    classes, remark = class_folders(root / "train", folders=folders, has_image=has_image)
    val = None
    if val_name and classes is None:
        others = [*others, val_name]
    elif val_name and classes is not None:
        val_classes = subfolders(root / val_name)
        if not val_classes:
            raise UserError(
                f"data.path: '{root / 'train'}' has class folders but '{root / val_name}' has none; "
                f"sort its images into the folders {', '.join(classes[:3])}, …"
            )
        check_same_classes("data.path", {f"{root / 'train'}": classes, f"{root / val_name}": val_classes})
    train = FolderImages(root / "train", classes=classes, cache_dir=cache_dir)
    if val_name and classes is not None:
        val = FolderImages(root / val_name, classes=classes, cache_dir=cache_dir)
    val_remark = val.index.remark() if val else None
    return Splits(train, val, join_remarks(remark, unused_remark(root, others), train.index.remark(), val_remark))


def class_folders(root: Path | str, *, folders: list[str], has_image: bool) -> tuple[list[str] | None, str | None]:
    """The class names, or None and the reason why the images are treated as unlabeled."""
    if len(folders) < 2:
        return None, f"no labels: '{root}' has {'only one class folder' if folders else 'no class folders'}"
    if has_image:
        return None, f"no labels: '{root}' contains images next to its folders"
    return folders, None


def check_same_classes(key: str, splits: dict[str, Collection[str]]) -> None:
    """Raise `UserError` if the two `splits`, by name, have different classes."""
    (train, train_classes), (val, val_classes) = splits.items()
    for present, missing, classes, others in (
        (train, val, train_classes, val_classes),
        (val, train, val_classes, train_classes),
    ):
        if lost := set(classes) - set(others):
            name = min(lost)
            raise UserError(
                f"{key}: the class folder '{name}' is in '{present}' but not in '{missing}' "
                f"({len(lost)} class{'es' * (len(lost) > 1)}); {did_you_mean(name, others)}"
            )


def unused_remark(root: Path, names: Iterable[str]) -> str | None:
    """Names what lies next to the splits in `root`; None if there is nothing."""
    unused = sorted(names)
    return f"not used in '{root}': {', '.join(unused[:5])}{', …' * (len(unused) > 5)}" if unused else None


def subfolders(root: Path) -> list[str]:
    """Sorted names of the folders directly in `root`, without hidden ones."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def existing_path(path: str, *, key: str = "data.path", files: bool = False) -> Path:
    """The path of a setting, with `~` expanded. Raises `UserError` with the closest name for the first missing part.

    With `files`, files are suggested too if only the last part is missing.
    """
    expected = usable_path(key, path).absolute()
    if expected.exists():
        return expected
    missing = next(part for part in (expected, *expected.parents) if part.parent.exists())
    folder = missing.parent
    siblings = _names(folder, files=files and missing == expected) if folder.is_dir() else []
    hint = did_you_mean(missing.name, siblings) if siblings else f"it has no {'files' if files else 'folders'} at all"
    raise UserError(f"{key}={path} does not exist: no '{missing.name}' in '{folder}'; {hint}")


def _names(folder: Path, *, files: bool) -> list[str]:
    with os.scandir(folder) as entries:
        names = (entry.name for entry in entries if not entry.name.startswith(".") and (files or entry.is_dir()))
        return sorted(islice(names, MAX_SUGGESTIONS))
