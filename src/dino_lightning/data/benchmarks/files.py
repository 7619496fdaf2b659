"""Image files in the folder of a benchmark."""

import os
from pathlib import Path

from PIL import Image

from dino_lightning.data.bad_images import UNREADABLE
from dino_lightning.data.sources.file_index import is_image
from dino_lightning.data.sources.folder import EXTENSIONS, existing_path
from dino_lightning.errors import UserError

INDEXED_MODES = ("P", "L", "1")
"""PIL's modes of images with one number per pixel, such as masks."""


def existing_folder(path: str | Path, *, key: str) -> Path:
    """The folder in the setting `key`. Raises `UserError` if it does not exist."""
    folder = existing_path(str(path), key=key)
    if not folder.is_dir():
        raise UserError(f"{key}={path} is a file; expected a folder.")
    return folder


def list_images(folder: str | Path, *, key: str, recursive: bool = False) -> list[Path]:
    """The image files in a folder, sorted by path; with `recursive`, also those in its subfolders.

    Raises `UserError` if there are none.
    """
    root = existing_folder(folder, key=key)
    folders = os.walk(root) if recursive else [next(os.walk(root))]
    images = sorted(Path(parent) / name for parent, _, names in folders for name in names if is_image(name))
    if not images:
        raise UserError(f"{key}={folder} contains no images; expected files with the extensions {EXTENSIONS}.")
    return images


def image_size(path: Path) -> tuple[int, int] | None:
    """Width and height of an image; None for a broken file, which is left out later."""
    try:
        with Image.open(path) as image:
            return image.size
    except UNREADABLE:
        return None
