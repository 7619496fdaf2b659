"""Image files named by a list: a text file with one path per line, or a table (`.csv`, `.tsv`) with a header.

In a text file, blank lines and lines that start with `#` are ignored. A path that is listed twice is two images.
Classes are sorted, numbers by value; a row without a class, or with a negative number, has the label -1.
"""

import csv
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from dino_lightning.config import ListingData
from dino_lightning.data.sources.base import Splits, evenly_spaced
from dino_lightning.data.sources.folder import existing_path
from dino_lightning.data.sources.mapped_arrays import ImageFiles, MappedArrays, Paths, pack_paths, store_if_large
from dino_lightning.data.sources.registry import register_source
from dino_lightning.errors import UserError, did_you_mean

DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""Extension of a table -> separator of its columns."""
DELIMITER_NAMES = {",": "commas", "\t": "tabs"}
INTEGER = re.compile(r"-?[0-9]{1,18}")
"""A class that is a number."""
HEADER_BYTES = 4096
"""Bytes that are read to recognize a file that is not a list."""
PROBES = 7
"""Files whose existence is tested when a list is opened."""


@register_source("listing", ListingData)
def open_listing(config: ListingData) -> Splits:
    """The listed images."""
    file = existing_path(config.path, files=True)
    if file.is_dir():
        raise UserError(f"data.path={config.path} is a folder; expected a list file, or use data=folder")
    _check_text(file)
    root = file.parent if config.root is None else existing_path(config.root, key="data.root")
    delimiter = DELIMITERS.get(file.suffix.lower())
    if delimiter is None:
        arrays, lines = _read_text(file, config)
        classes, unit = None, "line"
    else:
        arrays, classes = _read_table(file, config, delimiter=delimiter)
        lines, unit = np.arange(1, len(arrays["offsets"])), "row"
    if not len(lines):
        raise UserError(f"data.path={config.path} lists no images")
    _check_files(Paths(MappedArrays(arrays)), root=root, first=f"{unit} {lines[0]}")
    arrays = store_if_large(arrays, images=len(lines), cache_dir=config.cache_dir, of=file)
    remark = f"no labels: data.label_column={config.label_column} is empty" if config.label_column else "no labels"
    return Splits(ImageFiles(root, arrays=arrays, classes=classes), None, None if classes else remark)


def _check_text(file: Path) -> None:
    """Raise `UserError` for a web page, an image, or a text with two bytes per character."""
    with file.open("rb") as content:
        start = content.read(HEADER_BYTES)
    if b"\0" in start:
        kind = "UTF-16" if start.startswith((b"\xff\xfe", b"\xfe\xff")) else "not a text file"
        raise UserError(f"data.path: '{file}' is {kind}; save the list as UTF-8 text")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise UserError(f"data.path: '{file}' is a web page; download the list itself")


def _read_text(file: Path, config: ListingData) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """`blob` and `offsets` of the paths, and the line number (n,) of each, from 1."""
    for key, default in (("label_column", None), ("path_column", "path")):
        if (value := getattr(config, key)) != default:
            raise UserError(
                f"data.{key}={value} needs a table (.csv or .tsv), but data.path={config.path} is not a table"
            )
    lines = [line.strip() for line in file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    numbers = [number for number, line in enumerate(lines) if line and not line.startswith(b"#")]
    return pack_paths(lines[number] for number in numbers), np.array(numbers, dtype=np.int64) + 1


def _read_table(file: Path, config: ListingData, *, delimiter: str) -> tuple[dict[str, np.ndarray], list[str] | None]:
    """`blob` and `offsets` of the paths, `labels` if there are any, and the class names."""
    # Paths are bytes, because file names need not be UTF-8.
    types = {config.path_column: pa.large_binary()}
    if config.label_column is not None:
        types[config.label_column] = pa.dictionary(pa.int32(), pa.string())
    header = column_names(file, delimiter=delimiter)
    if not header:
        raise UserError(
            f"data.path_column={config.path_column} is not a column of '{file}': the file is empty; expected a "
            "header and one row per image"
        )
    if len(header) == 1 and config.path_column not in header and (other := re.search(r"[;,\t|]", header[0])):
        raise UserError(
            f"data.path: the columns of '{file}' are separated by {other[0]!r}, but {file.suffix} files need "
            f"{delimiter!r}; save it with {DELIMITER_NAMES[delimiter]}"
        )
    check_columns_exist(config, ("path_column", "label_column"), header, table=f"'{file}'")
    table = read_table(file, types, delimiter=delimiter)
    arrays = column_bytes(table[config.path_column])
    empty = np.flatnonzero(np.diff(arrays["offsets"]) == 0)
    if len(empty):
        raise UserError(f"data.path={config.path}: row {empty[0] + 1} has no {config.path_column}")
    if config.label_column is None:
        return arrays, None
    labels, classes = labels_and_classes(table[config.label_column])
    return (arrays | {"labels": labels}, classes) if classes else (arrays, None)


def column_names(file: Path, *, delimiter: str) -> list[str]:
    """The names in the header of a table."""
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        return next(csv.reader(lines, delimiter=delimiter), [])


def read_table(file: Path, types: dict[str, pa.DataType], *, delimiter: str = ",") -> pa.Table:
    """The columns named in `types`, a million rows in less than a second."""
    try:
        return pa_csv.read_csv(
            file,
            # Other columns, such as captions, may contain line breaks.
            parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(include_columns=list(types), column_types=types),
        )
    except pa.ArrowInvalid as error:
        raise UserError(f"data.path: '{file}' cannot be read as a table ({error})") from error


def check_columns_exist(config: Any, keys: tuple[str, ...], columns: Iterable[str], *, table: str) -> None:
    """Raise `UserError` if the column that `config` names in one of `keys` is not among the `columns` of `table`."""
    for key in keys:
        name = getattr(config, key)
        if name is not None and name not in columns:
            hint = did_you_mean(name, columns)
            if key == "label_column":
                hint += " Use null for no labels" if hint.endswith("?") else ", or null for no labels"
            raise UserError(f"data.{key}={name} is not a column of {table}; {hint}")


def labels_and_classes(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Labels (n,) int64 and class names of a dictionary-encoded text column."""
    encoded: Any = column.unify_dictionaries().combine_chunks()
    names: list[str] = encoded.dictionary.to_pylist()
    numbers = {name: int(name) for name in names if INTEGER.fullmatch(name)}
    if all(name in numbers for name in names if name):
        classes = sorted((name for name in names if numbers.get(name, -1) >= 0), key=lambda name: (numbers[name], name))
    else:
        classes = sorted(filter(None, names))
    label_of = {name: label for label, name in enumerate(classes)}
    translation = np.array([label_of.get(name, -1) for name in names], dtype=np.int64)
    return translation[encoded.indices.to_numpy()], classes


def column_bytes(column: pa.ChunkedArray) -> dict[str, np.ndarray]:
    """A column of large strings or large binaries as contiguous `blob` and `offsets`."""
    values: Any = pa.concat_arrays(column.chunks)
    _, offsets, blob = values.buffers()
    bounds = np.frombuffer(offsets or bytes(8), dtype=np.int64)[values.offset :][: len(values) + 1]
    return {"blob": np.frombuffer(blob or b"", dtype=np.uint8)[bounds[0] : bounds[-1]], "offsets": bounds - bounds[0]}


def _check_files(paths: Paths, *, root: Path, first: str) -> None:
    """Raise `UserError` if none of a few files exists: single files may be missing, but not all of them."""
    tested = evenly_spaced(len(paths), PROBES)
    if not any(os.path.exists(os.path.join(root, paths[i])) for i in tested):
        path = paths[0]
        raise UserError(
            f"data.path: {first} of the list names '{path}', but none of the {len(tested)} tested files exists, such "
            f"as '{os.path.join(root, path)}'; set data.root to the folder that the paths are relative to"
        )
