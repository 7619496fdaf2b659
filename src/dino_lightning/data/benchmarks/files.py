"""Image files of a benchmark's folder."""

import os
from pathlib import Path

from PIL import Image

from dino_lightning.data.bad_images import UNREADABLE
from dino_lightning.data.sources.file_index import is_image
from dino_lightning.data.sources.folder import existing_path, extensions
from dino_lightning.errors import UserError


def existing_folder(path: str | Path, *, key: str) -> Path:
    """The folder of the setting `key`. Raises `UserError` where there is none."""
    folder = existing_path(str(path), key=key)
    if not folder.is_dir():
        raise UserError(f"{key}={path} is a file, not a folder.")
    return folder


def images_in(folder: str | Path, *, key: str, below: bool = False) -> list[Path]:
    """The folder's image files, sorted by path; with `below`, those of its subfolders too.

    Raises `UserError` where there is none.
    """
    root = existing_folder(folder, key=key)
    walked = os.walk(root) if below else [next(os.walk(root))]
    found = sorted(Path(at) / name for at, _, names in walked for name in names if is_image(name))
    if not found:
        raise UserError(f"{key}={folder} has no images; expected files that end in {extensions()}.")
    return found


def size_of(path: Path) -> tuple[int, int] | None:
    """Width and height of an image; None of a broken file, which is left out later."""
    try:
        with Image.open(path) as image:
            return image.size
    except UNREADABLE:
        return None
