"""Recognizes the source that reads a path from file extensions, for commands that do not name it."""

import os
from collections import Counter
from pathlib import Path

from dino_lightning.config.paths import usable_path
from dino_lightning.errors import UserError

SOURCE_BY_SUFFIX = {
    ".csv": "listing",
    ".tsv": "listing",
    ".txt": "listing",
    ".zip": "archive",
    ".tar": "archive",
    ".parquet": "parquet",
}
"""File extension -> name of the source (`data=NAME`)."""
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"}


def detect_source(path: str) -> str:
    """The name of the source that reads the path, from its extension or from the first conclusive folder below it.

    Raises `UserError` if a folder contains both archives and folders with images, because one of them would be ignored.
    """
    root = usable_path("data.path", path)
    if not root.is_dir():
        return SOURCE_BY_SUFFIX.get(root.suffix.lower(), "folder")
    for folder, subfolders, files in os.walk(root):
        subfolders.sort()
        if "state.json" in files or "dataset_dict.json" in files:
            return "parquet"
        counts = Counter(Path(folder, name).suffix.lower() for name in files if not name.startswith("."))
        images = sum(count for suffix, count in counts.items() if suffix not in (*SOURCE_BY_SUFFIX, ".json", ".md", ""))
        for suffix in (".parquet", ".tar", ".zip"):
            if counts[suffix] and counts[suffix] >= images:  # a single archive among photographs is not the data
                with_images = next(filter(_has_images, (Path(folder, name) for name in subfolders)), None)
                if with_images is not None:
                    raise UserError(
                        f"data.path={path}: there are {suffix} files in '{folder}' and images in '{with_images}'; set "
                        f"data={SOURCE_BY_SUFFIX[suffix]} or data=folder, or choose the path of one of them."
                    )
                return SOURCE_BY_SUFFIX[suffix]
        if images:
            return "folder"
    return "folder"


def _has_images(folder: Path) -> bool:
    return any(Path(name).suffix.lower() in IMAGE_SUFFIXES for _, _, files in os.walk(folder) for name in files)
