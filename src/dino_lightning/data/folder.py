"""Image files on disk: `train/` and `val/`, or class folders, or a flat folder without labels.

The layout is recognised from the folder names alone, before any file is listed:

    path/train[/class]/…   and path/val, path/validation or path/test   the splits
    path/class/…                                                        class folders, no validation split
    path/…                                                              no labels

Classes are first-level folders, and images may lie at any depth below them, as in torchvision's `ImageFolder`; the
order of the images is its order too. Hidden files and folders do not count.
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension, pil_loader

from dino_lightning.config.images import FolderData
from dino_lightning.errors import UserError, nearest

VAL_NAMES = ("val", "validation", "test")
"""Names of a validation split, in the order in which they are looked for."""


class FolderImages:
    """The images below `root`, labelled by their first-level folder; `classes=None` takes all of them without labels.

    Paths are kept as one bytes array (n,) relative to `root`: loader workers share it, whereas a list of a million
    strings would be copied page by page as their reference counts change.
    """

    def __init__(self, root: Path, *, classes: list[str] | None):
        self.root = root
        self.classes = classes
        files = [image_files(root, below=name) for name in (["."] if classes is None else classes)]
        for name, found in zip(classes or [], files, strict=False):
            if not len(found):
                raise UserError(
                    f"data.path: the class folder '{root / name}' holds no image ({extensions()}); "
                    "fill it or move it away"
                )
        self.files = np.concatenate(files)
        if not len(self.files):
            raise UserError(f"data.path: '{root}' holds no image ({extensions()} are looked for, at any depth)")
        counts = [len(found) for found in files]
        self.labels = None if classes is None else np.repeat(np.arange(len(counts), dtype=np.int64), counts)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Image as RGB, stored orientation (EXIF rotation is not applied, as in the original), and label or -1."""
        return pil_loader(self.describe(index)), -1 if self.labels is None else int(self.labels[index])

    def describe(self, index: int) -> str:
        """Path of the file."""
        return os.path.join(self.root, os.fsdecode(self.files[index]))


def open_folder(config: FolderData) -> tuple[FolderImages, FolderImages | None, str | None]:
    """Training images, validation images where there are labelled ones, and what the user should know."""
    root = existing_path(config.path)
    if not root.is_dir():
        raise UserError(f"data.path={config.path} is a file; give the folder of the images")
    folders = subfolders(root)
    val_name = next((name for name in VAL_NAMES if name in folders), None)
    if "train" in folders:
        return _open_splits(root, val_name=val_name, others=[n for n in folders if n not in ("train", *VAL_NAMES)])
    if val_name and set(folders) <= set(VAL_NAMES):
        raise UserError(f"data.path={config.path} has '{val_name}/' but no 'train/'; add it or give the folder itself")
    classes, notice = class_folders(root)
    return FolderImages(root, classes=classes), None, notice


def _open_splits(
    root: Path, *, val_name: str | None, others: list[str]
) -> tuple[FolderImages, FolderImages | None, str | None]:
    classes, notice = class_folders(root / "train")
    ignored = list(others)
    if val_name and classes is None:
        ignored.append(val_name)
    elif val_name and classes is not None:
        _check_same_classes(root, classes, val_name=val_name)
    if ignored:
        beside = f"beside '{root / 'train'}', not used: {', '.join(sorted(ignored)[:5])}{', …' * (len(ignored) > 5)}"
        notice = f"{notice}; {beside}" if notice else beside
    train = FolderImages(root / "train", classes=classes)
    val = FolderImages(root / val_name, classes=classes) if val_name and classes is not None else None
    return train, val, notice


def class_folders(root: Path) -> tuple[list[str] | None, str | None]:
    """Sorted class names, or None and the reason why the images count as unlabelled."""
    folders = subfolders(root)
    if len(folders) < 2:
        return None, f"no labels: '{root}' has {'one folder only' if folders else 'no class folders'}"
    if any(_is_image(entry.name) and entry.is_file() for entry in os.scandir(root)):
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
                f"({len(names)} such); {nearest(name, others)}"
            )


def image_files(root: Path, *, below: str = ".") -> np.ndarray:
    """Paths (n,) of the images at any depth under `root/below`, relative to `root`, as bytes."""
    found: list[tuple[str, list[str]]] = []
    for folder, inside, names in os.walk(os.path.join(root, below), followlinks=True):
        inside[:] = [name for name in inside if not name.startswith(".")]
        found.append((os.path.relpath(folder, root), sorted(name for name in names if _is_image(name))))
    # By folder and then by name: the order of torchvision's make_dataset, so that a seed means the same order there.
    paths = [os.path.normpath(os.path.join(folder, name)) for folder, names in sorted(found) for name in names]
    return np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)


def subfolders(root: Path) -> list[str]:
    """Sorted names of the folders directly under `root`, hidden ones left out."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def existing_path(path: str) -> Path:
    """`data.path` with `~` expanded. Raises `UserError` with the closest name beside the first missing part."""
    wanted = Path(path).expanduser().absolute()
    if wanted.exists():
        return wanted
    lost = next(part for part in (wanted, *wanted.parents) if part.parent.exists())
    folder = lost.parent
    siblings = subfolders(folder) if folder.is_dir() else []
    hint = nearest(lost.name, siblings) if siblings else "it has no folders at all"
    raise UserError(f"data.path={path} does not exist: no '{lost.name}' in '{folder}'; {hint}")


def extensions() -> str:
    """The recognised file name endings, for messages."""
    return ", ".join(IMG_EXTENSIONS)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and has_file_allowed_extension(name, IMG_EXTENSIONS)
