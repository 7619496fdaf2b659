"""Image files named by a list: a text file with one path per line, or a table (`.csv`, `.tsv`) with a header.

In a text file, blank lines and lines that begin with `#` do not count. A path that stands twice is two images. Classes
are sorted, numbers by value; a row without a class, or with a negative number, has the label -1.
"""

import csv
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from dino_lightning.config import ListingData
from dino_lightning.data.sources.base import Splits
from dino_lightning.data.sources.folder import existing_path
from dino_lightning.data.sources.mapped_arrays import (
    LARGE,
    MappedArrays,
    Paths,
    cache_place,
    files_digest,
    packed,
    store,
)
from dino_lightning.errors import UserError, did_you_mean

DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""Ending of a table -> what stands between its columns."""
NUMBER = re.compile(r"-?[0-9]{1,18}")
"""A class that is a number."""
BEGINNING = 4096
"""Bytes by which a list is told from other files."""
PROBES = 7
"""Files that are looked for when a list is opened."""


class ListingImages:
    """The files `blob`, `offsets` of `kept` below `root`; `labels` is int64 (n,), -1 where the list has none."""

    def __init__(self, root: Path, *, kept: MappedArrays, classes: list[str] | None):
        self.root = str(root)
        self.classes = classes
        self._kept = kept
        self._paths = Paths(kept)

    @property
    def labels(self) -> np.ndarray | None:
        """Number of the class (n,) int64; None without labels."""
        return None if self.classes is None else self._kept["labels"]

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> bytes:
        """The file."""
        with open(self.describe(index), "rb") as file:
            return file.read()

    def describe(self, index: int) -> str:
        """Path of the file."""
        return os.path.join(self.root, self._paths[index])

    def fingerprint(self) -> str:
        """Of the files' paths, sizes and times."""
        return files_digest([self._paths.blob, self._paths.offsets], files=map(self.describe, range(len(self))))


def open_listing(config: ListingData) -> Splits:
    """The listed images, and what the user should know."""
    file = existing_path(config.path, files=True)
    if file.is_dir():
        raise UserError(f"data.path={config.path} is a folder; give the list, or read the folder with data=folder")
    _check_text(file)
    root = file.parent if config.root is None else existing_path(config.root, key="data.root")
    delimiter = DELIMITERS.get(file.suffix.lower())
    if delimiter is None:
        arrays, lines = _read_text(file, config)
        classes, place = None, "line"
    else:
        arrays, classes = _read_table(file, config, delimiter=delimiter)
        lines, place = np.arange(1, len(arrays["offsets"])), "row"
    if not len(lines):
        raise UserError(f"data.path={config.path} lists no image")
    _check_some(Paths(MappedArrays(arrays)), root=root, place=place, lines=lines)
    kept = MappedArrays(arrays) if len(lines) < LARGE else store(arrays, under=cache_place(config.cache_dir, of=file))
    missing = f"no labels: data.label_column={config.label_column} is empty" if config.label_column else "no labels"
    return Splits(ListingImages(root, kept=kept, classes=classes), None, None if classes else missing)


def _check_text(file: Path) -> None:
    """Refuse what is no list: a web page, an image, a text of two bytes for each letter."""
    with file.open("rb") as content:
        start = content.read(BEGINNING)
    if b"\0" in start:
        kind = "UTF-16" if start.startswith((b"\xff\xfe", b"\xfe\xff")) else "no text"
        raise UserError(f"data.path: '{file}' is {kind}; save the list as text in UTF-8")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise UserError(f"data.path: '{file}' is a web page; download the list itself")


def _read_text(file: Path, config: ListingData) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """`blob` and `offsets` of the paths, and the line (n,) of each, from 1."""
    for key, value, default in (
        ("label_column", config.label_column, None),
        ("path_column", config.path_column, "path"),
    ):
        if value != default:
            raise UserError(f"data.{key}={value} needs a table (.csv or .tsv), but data.path={config.path} is none")
    lines = [line.strip() for line in file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    counted = [number for number, line in enumerate(lines) if line and not line.startswith(b"#")]
    return packed(lines[number] for number in counted), np.array(counted, dtype=np.int64) + 1


def _read_table(file: Path, config: ListingData, *, delimiter: str) -> tuple[dict[str, np.ndarray], list[str] | None]:
    """`blob` and `offsets` of the paths, with `labels` where there are some, and the names of the classes."""
    wanted = {"path_column": config.path_column, "label_column": config.label_column}
    columns = {key: name for key, name in wanted.items() if name is not None}
    # Paths as bytes: names of files need not be UTF-8.
    types = {config.path_column: pa.large_binary()}
    if config.label_column is not None:
        types[config.label_column] = pa.dictionary(pa.int32(), pa.string())
    header = column_names(file, delimiter=delimiter)
    if not header:
        raise UserError(
            f"data.path_column={config.path_column} is not a column of '{file}': it is empty; expected a "
            "header and a row for each image"
        )
    if len(header) == 1 and config.path_column not in header and (other := re.search(r"[;,\t|]", header[0])):
        raise UserError(
            f"data.path: the columns of '{file}' are separated by {other[0]!r}, and {file.suffix} stands "
            f"for {delimiter!r}; save it with that"
        )
    for key, name in columns.items():
        if name not in header:
            off = "; null for no labels" if key == "label_column" else ""
            raise UserError(f"data.{key}={name} is not a column of '{file}'; {did_you_mean(name, header)}{off}")
    table = read_table(file, types, delimiter=delimiter)
    arrays = column_bytes(table[config.path_column])
    empty = np.flatnonzero(np.diff(arrays["offsets"]) == 0)
    if len(empty):
        raise UserError(f"data.path={config.path}: row {empty[0] + 1} has no {config.path_column}")
    if config.label_column is None:
        return arrays, None
    labels, classes = numbered(table[config.label_column])
    return (arrays | {"labels": labels}, classes) if classes else (arrays, None)


def column_names(file: Path, *, delimiter: str) -> list[str]:
    """The header of a table."""
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        return next(csv.reader(lines, delimiter=delimiter), [])


def read_table(file: Path, types: dict[str, pa.DataType], *, delimiter: str = ",") -> pa.Table:
    """The columns named in `types`, a million rows in less than a second."""
    try:
        return pa_csv.read_csv(
            file,
            # Texts in other columns, such as captions, may have line breaks.
            parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(include_columns=list(types), column_types=types),
        )
    except pa.ArrowInvalid as error:
        raise UserError(f"data.path: '{file}' cannot be read as a table ({error})") from error


def numbered(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Labels (n,) int64 and class names of a column of texts in dictionary form."""
    encoded: Any = column.unify_dictionaries().combine_chunks()
    names: list[str] = encoded.dictionary.to_pylist()
    numbers = {name: int(name) for name in names if NUMBER.fullmatch(name)}
    if all(name in numbers for name in names if name):
        classes = sorted((name for name in names if numbers.get(name, -1) >= 0), key=lambda name: (numbers[name], name))
    else:
        classes = sorted(filter(None, names))
    label_of = {name: label for label, name in enumerate(classes)}
    translation = np.array([label_of.get(name, -1) for name in names], dtype=np.int64)
    return translation[encoded.indices.to_numpy()], classes


def column_bytes(column: pa.ChunkedArray) -> dict[str, np.ndarray]:
    """A column of large texts or large binaries as `blob` and `offsets`, in one piece."""
    values: Any = pa.concat_arrays(column.chunks)
    _, offsets, blob = values.buffers()
    bounds = np.frombuffer(offsets or bytes(8), dtype=np.int64)[values.offset :][: len(values) + 1]
    return {
        "blob": np.frombuffer(blob or b"", dtype=np.uint8)[bounds[0] : bounds[-1]],
        "offsets": bounds - bounds[0],
    }


def probes(count: int) -> np.ndarray:
    """First, last and some images between."""
    return np.unique(np.linspace(0, count - 1, PROBES).astype(np.int64))


def _check_some(paths: Paths, *, root: Path, place: str, lines: np.ndarray) -> None:
    """Raises `UserError` where none of a handful of files is there: a single one may lack, all mean a wrong root."""
    tried = probes(len(paths))
    if not any(os.path.exists(os.path.join(root, paths[i])) for i in tried):
        first = paths[0]
        raise UserError(
            f"data.path: {place} {lines[0]} of the list names '{first}', but none of {len(tried)} files looked for "
            f"exists, such as '{os.path.join(root, first)}'; set data.root to the folder that the paths are relative to"
        )
