"""TODO."""

import os
from collections import Counter
from pathlib import Path

from dino_lightning.config.paths import usable_path
from dino_lightning.errors import UserError

ENDINGS = {
    ".csv": "listing",
    ".tsv": "listing",
    ".txt": "listing",
    ".zip": "archive",
    ".tar": "archive",
    ".parquet": "parquet",
}
"""Ending of a file -> option of `data`."""


IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"}
"""Endings that tell a folder of images."""


def kind_of(path: str) -> str:
    """The option of `data` that reads the path, from its ending or the first file below it that says so.

    Raises `UserError` where archives lie beside folders with images: one of the two would be left out.
    """
    root = usable_path("data.path", path)
    if not root.is_dir():
        return ENDINGS.get(root.suffix.lower(), "folder")
    for folder, inside, files in os.walk(root):
        inside.sort()
        if "state.json" in files or "dataset_dict.json" in files:
            return "parquet"
        found = Counter(Path(folder, name).suffix.lower() for name in files if not name.startswith("."))
        images = sum(count for ending, count in found.items() if ending not in (*ENDINGS, ".json", ".md", ""))
        for ending in (".parquet", ".tar", ".zip"):
            if found[ending] and found[ending] >= images:  # one of them among photographs is not the data
                beside = next(filter(_has_images, (Path(folder, name) for name in inside)), None)
                if beside is not None:
                    found_here = f"there are {ending} files in '{folder}' and images in '{beside}'"
                    kinds = f"data={ENDINGS[ending]} or data=folder"
                    raise UserError(f"data.path={path}: {found_here}; say which ({kinds}), or give one of them.")
                return ENDINGS[ending]
        if images:
            return "folder"
    return "folder"


def _has_images(folder: Path) -> bool:
    return any(Path(name).suffix.lower() in IMAGES for _, _, files in os.walk(folder) for name in files)
