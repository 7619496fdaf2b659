"""Google Landmarks v2: a table of image identifiers, and image files in folders named by their first characters.

The image "0123456789abcdef" is `0/1/2/0123456789abcdef.jpg` below `path`, or below its `train/`. Only the 64 bits of
each identifier are stored, instead of the paths of the four million images.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dino_lightning.config import LandmarksData
from dino_lightning.data.sources.base import Splits, evenly_spaced
from dino_lightning.data.sources.folder import existing_path
from dino_lightning.data.sources.listing import PROBES, column_bytes, column_names, read_table
from dino_lightning.data.sources.mapped_arrays import ImageFiles, store_if_large
from dino_lightning.data.sources.registry import register_source
from dino_lightning.errors import UserError, did_you_mean

compute: Any = pc  # pyright does not know its functions, which are created at import
DIGITS = 16
"""Length of an identifier, in hexadecimal digits."""
TABLES = (("id", "landmark_id"), ("landmark_id", "images"))
"""Columns of `train.csv` (one image per row) and of `train_clean.csv` (one landmark with all its images per row)."""


class LandmarkImages(ImageFiles):
    """Images `ids` (n,) uint64 with `labels` (n,) int64, both in `arrays`; the classes are the landmark numbers."""

    path_arrays = ("ids",)

    def __len__(self) -> int:
        return len(self.arrays["ids"])

    def describe(self, index: int) -> str:
        """Path of the file."""
        name = f"{int(self.arrays['ids'][index]):0{DIGITS}x}"
        return os.path.join(self.root, name[0], name[1], name[2], f"{name}.jpg")


@register_source("gldv2", LandmarksData)
def open_landmarks(config: LandmarksData) -> Splits:
    """The labeled images of the table; there is no validation split."""
    root = existing_path(config.path)
    file = root / config.csv
    if not file.is_file():
        tables = sorted(path.name for path in root.glob("*.csv"))
        hint = did_you_mean(config.csv, tables) if tables else "it contains no CSV file"
        raise UserError(f"data.csv={config.csv} is not a file in data.path={config.path}; {hint}")
    ids, landmarks = _read(file)
    if not len(ids):
        raise UserError(f"data.csv={config.csv} lists no images")
    numbers, labels = np.unique(landmarks, return_inverse=True)
    arrays = {"ids": ids, "labels": labels.reshape(-1).astype(np.int64)}
    stored = store_if_large(arrays, images=len(ids), cache_dir=config.cache_dir, of=file)
    classes = [str(number) for number in numbers.tolist()]
    for folder in (root, root / "train"):
        train = LandmarkImages(folder, arrays=stored, classes=classes)
        if any(os.path.exists(train.describe(i)) for i in evenly_spaced(len(train), PROBES)):
            return Splits(train, None, None)
    first = os.path.relpath(LandmarkImages(root, arrays=stored, classes=classes).describe(0), root)
    raise UserError(
        f"data.path={config.path} does not contain the images of {config.csv}: none of the tested files exists, such "
        f"as '{first}' or 'train/{first}'"
    )


def _read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Identifiers (n,) uint64 and landmark numbers (n,) int64."""
    header = column_names(file, delimiter=",")
    columns = next((names for names in TABLES if set(names) <= set(header)), None)
    if columns is None:
        raise UserError(
            f"data.csv={file.name} has the columns {', '.join(header)}; expected id and landmark_id (train.csv), or "
            "landmark_id and images (train_clean.csv)"
        )
    # Explicit types, because identifiers with only digits would be read as numbers, without their leading zeros.
    types = {name: pa.int64() if name == "landmark_id" else pa.large_string() for name in columns}
    table = read_table(file, types)
    landmarks = table["landmark_id"].to_numpy()
    if "images" not in columns:
        return _identifier_bits(table["id"], file=file), landmarks
    names: Any = compute.utf8_split_whitespace(table["images"])
    counts = compute.list_value_length(names).to_numpy()
    return _identifier_bits(compute.list_flatten(names), file=file), np.repeat(landmarks, counts)


def _identifier_bits(names: pa.ChunkedArray, *, file: Path) -> np.ndarray:
    """The 64 bits (n,) uint64 of the identifiers. Raises `UserError` for the first invalid one."""
    valid: Any = compute.match_substring_regex(names, f"^[0-9a-f]{{{DIGITS}}}$")
    if len(names) and not compute.all(valid).as_py():
        invalid = names[compute.index(valid, False).as_py()].as_py()
        raise UserError(f"data.csv={file.name} lists '{invalid}'; expected identifiers with {DIGITS} digits 0-9, a-f")
    # All identifiers have the same length, so the column's memory is a matrix.
    letters = column_bytes(names)["blob"].reshape(-1, DIGITS)
    values = np.where(letters >= ord("a"), letters - (ord("a") - 10), letters - ord("0"))
    pairs = values[:, ::2] << 4 | values[:, 1::2]
    return np.ascontiguousarray(pairs).view(">u8").reshape(-1).astype(np.uint64)
