"""Google Landmarks v2: a table of image identifiers, and files in folders named by an identifier's first characters.

The image "0123456789abcdef" is `0/1/2/0123456789abcdef.jpg` below `path`, or below its `train/`. Of the four million
images no path is kept, only the identifiers' 64 bits each.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dino_lightning.config import LandmarksData
from dino_lightning.data.sources.base import Splits
from dino_lightning.data.sources.folder import existing_path
from dino_lightning.data.sources.listing import column_bytes, column_names, probes, read_table
from dino_lightning.data.sources.mapped_arrays import LARGE, MappedArrays, cache_place, files_digest, store
from dino_lightning.errors import UserError, did_you_mean

compute: Any = pc  # its functions are made at import, which pyright cannot see
DIGITS = 16
"""Length of an identifier, in hexadecimal digits."""
TABLES = (("id", "landmark_id"), ("landmark_id", "images"))
"""Columns of `train.csv`, one image a row, and of `train_clean.csv`, a landmark with all of its images a row."""


class LandmarkImages:
    """Images `ids` (n,) uint64 with `labels` (n,) int64, both in `kept`; the classes are the landmarks' numbers."""

    def __init__(self, root: Path, *, kept: MappedArrays, classes: list[str]):
        self.root = str(root)
        self.classes = classes
        self._kept = kept

    @property
    def labels(self) -> np.ndarray:
        """Number of the class (n,) int64."""
        return self._kept["labels"]

    def __len__(self) -> int:
        return len(self._kept["ids"])

    def read(self, index: int) -> bytes:
        """The file."""
        with open(self.describe(index), "rb") as file:
            return file.read()

    def describe(self, index: int) -> str:
        """Path of the file."""
        name = f"{int(self._kept['ids'][index]):0{DIGITS}x}"
        return os.path.join(self.root, name[0], name[1], name[2], f"{name}.jpg")

    def fingerprint(self) -> str:
        """Of the identifiers and the files' sizes and times."""
        return files_digest([self._kept["ids"]], files=map(self.describe, range(len(self))))


def open_landmarks(config: LandmarksData) -> Splits:
    """The images of the table; they have labels and no validation split."""
    root = existing_path(config.path)
    file = root / config.csv
    if not file.is_file():
        tables = sorted(path.name for path in root.glob("*.csv"))
        hint = did_you_mean(config.csv, tables) if tables else "there is no CSV at all"
        raise UserError(f"data.csv={config.csv} is not a file in data.path={config.path}; {hint}")
    ids, landmarks = _read(file)
    if not len(ids):
        raise UserError(f"data.csv={config.csv} lists no image")
    numbers, labels = np.unique(landmarks, return_inverse=True)
    arrays = {"ids": ids, "labels": labels.reshape(-1).astype(np.int64)}
    kept = MappedArrays(arrays) if len(ids) < LARGE else store(arrays, under=cache_place(config.cache_dir, of=file))
    classes = [str(number) for number in numbers.tolist()]
    for folder in (root, root / "train"):
        train = LandmarkImages(folder, kept=kept, classes=classes)
        if any(os.path.exists(train.describe(i)) for i in probes(len(train))):
            return Splits(train, None, None)
    first = os.path.relpath(LandmarkImages(root, kept=kept, classes=classes).describe(0), root)
    raise UserError(
        f"data.path={config.path} lacks the images of {config.csv}: neither '{first}' nor 'train/{first}' is there, "
        "for one of several that were looked for"
    )


def _read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Identifiers (n,) uint64 and landmarks (n,) int64."""
    header = column_names(file, delimiter=",")
    columns = next((names for names in TABLES if set(names) <= set(header)), None)
    if columns is None:
        raise UserError(
            f"data.csv={file.name} has the columns {', '.join(header)}; expected are id and landmark_id (train.csv), "
            "or landmark_id and images (train_clean.csv)"
        )
    # Named types: identifiers of digits alone would be read as numbers, without their leading zeros.
    types = {name: pa.int64() if name == "landmark_id" else pa.large_string() for name in columns}
    table = read_table(file, types)
    landmarks = table["landmark_id"].to_numpy()
    if "images" not in columns:
        return _numbers(table["id"], file=file), landmarks
    names: Any = compute.utf8_split_whitespace(table["images"])
    counts = compute.list_value_length(names).to_numpy()
    return _numbers(compute.list_flatten(names), file=file), np.repeat(landmarks, counts)


def _numbers(names: pa.ChunkedArray, *, file: Path) -> np.ndarray:
    """The 64 bits (n,) uint64 of identifiers. Raises `UserError` with the first that is none."""
    right: Any = compute.match_substring_regex(names, f"^[0-9a-f]{{{DIGITS}}}$")
    if len(names) and not compute.all(right).as_py():
        wrong = names[compute.index(right, False).as_py()].as_py()
        raise UserError(f"data.csv={file.name} lists '{wrong}', which is no identifier ({DIGITS} digits 0-9, a-f)")
    # All have the same length, so the column's memory is a matrix.
    letters = column_bytes(names)["blob"].reshape(-1, DIGITS)
    values = np.where(letters >= ord("a"), letters - (ord("a") - 10), letters - ord("0"))
    pairs = values[:, ::2] << 4 | values[:, 1::2]
    return np.ascontiguousarray(pairs).view(">u8").reshape(-1).astype(np.uint64)
