"""Parquet files in the Hugging Face image layout, and folders written by `save_to_disk`.

Rows come from the memory-mapped Arrow files of `datasets`: the first run converts the parquet files into its cache
(`HF_DATASETS_CACHE`), later ones open in a tenth of a second, and processes share the memory. If the cache cannot be
written, pyarrow reads the parquet files, which needs all encoded images in the memory of every process.
"""

import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetGenerationError

from dino_lightning.config import HuggingFaceData, ParquetData
from dino_lightning.data.sources.base import Splits, content_digest, join_remarks
from dino_lightning.data.sources.folder import existing_path
from dino_lightning.data.sources.listing import check_columns_exist
from dino_lightning.data.sources.registry import register_source
from dino_lightning.errors import UserError

Columns = ParquetData | HuggingFaceData
"""Configurations with `image_column` and `label_column`."""
VAL_PREFIXES = ("val", "test")
"""Prefixes of a validation split's name, in order of precedence (`val` matches `validation`)."""
MAX_CLASSES = 1_000_000
"""A column with larger numbers contains identifiers instead of labels."""


class ParquetImages:
    """The rows of one split. `labels` is int64 (n,), -1 for an unlabeled row; None without any labels.

    `parts` are the names of the files and their numbers of rows, in order, for `describe`. `state` changes if the rows
    change; None for the fingerprint of `datasets`.
    """

    def __init__(
        self, rows: datasets.Dataset, *, config: Columns, parts: list[tuple[str, int]], state: str | None = None
    ):
        image_type = datasets.Image(decode=False)  # because `datasets` would apply the EXIF rotation
        self._images = rows.select_columns([config.image_column]).cast_column(config.image_column, image_type)
        self._column, self._parts = config.image_column, parts
        self._state = rows._fingerprint if state is None else state
        self.classes: list[str] | None = None
        self.labels: np.ndarray | None = None
        if config.label_column is not None:
            table: Any = rows.select_columns([config.label_column]).with_format("arrow")[:]
            labels = table.column(config.label_column).cast(pa.int64()).fill_null(-1).to_numpy()
            self.labels = labels if (labels >= 0).any() else None

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> bytes:
        """The encoded image. Raises `ValueError` if the row has none."""
        encoded = self._images[int(index)][self._column] or {}
        if encoded.get("bytes") is not None:
            return encoded["bytes"]
        if encoded.get("path") is None:
            raise ValueError("the row has no image")
        return Path(encoded["path"]).read_bytes()

    def describe(self, index: int) -> str:
        """Name of the file and row in it."""
        row = int(index)
        for name, count in self._parts:
            if row < count:
                return f"{name} row {row}"
            row -= count
        raise IndexError(index)

    def fingerprint(self) -> str:
        """Digest of the files' paths, sizes and times (or of the fingerprint of `datasets`) and of the column."""
        return content_digest(self._state.encode(), self._column.encode())


@register_source("parquet", ParquetData)
def open_parquet(config: ParquetData) -> Splits:
    """Training images, and validation images if there are labeled ones."""
    root = existing_path(config.path)
    saved = any((root / name).is_file() for name in ("state.json", "dataset_dict.json"))
    with _without_progress_bars():
        train, val, names, remark = _open_saved(root, config) if saved else _open_files(root, config)
    return with_classes(train, val, names=names, remark=remark, config=config)


def with_classes(
    train: ParquetImages, val: ParquetImages | None, *, names: list[str] | None, remark: str | None, config: Columns
) -> Splits:
    """Set the class names of both splits; an unlabeled `val` is dropped. Raises `UserError` for invalid labels."""
    if train.labels is None:
        return Splits(train, None, join_remarks(remark, "no labels: no k-NN evaluation"))
    if val is not None and val.labels is None:
        val, remark = None, join_remarks(remark, "the validation split has no labels and is not used")
    labels = [split.labels for split in (train, val) if split is not None and split.labels is not None]
    lowest, highest = min(int(part.min()) for part in labels), max(int(part.max()) for part in labels)
    column = f"data.label_column={config.label_column}"
    if lowest < -1:
        raise UserError(
            f"{column} contains the label {lowest}; expected class numbers from 0, and -1 or an empty cell for an "
            "unlabeled image"
        )
    if names and highest >= len(names):
        raise UserError(f"{column} contains the label {highest}, but there are {len(names)} class names")
    if highest >= MAX_CLASSES:
        raise UserError(f"{column} contains the label {highest}; expected class numbers from 0")
    train.classes = names or [str(label) for label in range(highest + 1)]
    if val is not None:
        val.classes = train.classes
    return Splits(train, val, remark)


Opened = tuple[ParquetImages, ParquetImages | None, list[str] | None, str | None]
"""Training images, validation images, class names, remark."""


def _open_saved(root: Path, config: ParquetData) -> Opened:
    """A `Dataset` (all training images) or a `DatasetDict`, written by `save_to_disk`."""
    saved = datasets.load_from_disk(str(root))
    splits = dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if "train" not in splits:
        raise UserError(f"data.path={config.path} has the splits {', '.join(map(str, splits))}, but no 'train'")
    val_name = next((str(name) for start in VAL_PREFIXES for name in splits if str(name).startswith(start)), None)
    opened = {}
    for name in filter(None, ("train", val_name)):
        rows = splits[name]
        check_columns(rows.features, config, table=f"the split '{name}'")
        if not len(rows):
            raise UserError(f"data.path={config.path}: the split '{name}' has no rows")
        opened[name] = ParquetImages(rows, config=config, parts=[(f"{root.name} {name}", len(rows))])
    return opened["train"], opened.get(val_name), label_names(splits["train"].features, config), None


def _open_files(root: Path, config: ParquetData) -> Opened:
    train_files, val_files, remark = split_files(root, config)
    names = None
    for file in [*train_files, *val_files]:
        try:
            schema = pq.read_schema(file)
            features = datasets.Features.from_arrow_schema(schema)
        except Exception as error:  # of Arrow, and of `datasets`, which parses its metadata in the file
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"data.path: '{file}' is not a readable parquet file ({reason})") from error
        check_columns(features, config, table=f"'{file}'")
        if names is None:
            names = label_names(features, config) or _schema_classes(schema, file=file)
    base = root if root.is_dir() else root.parent
    train, cache_remark = _read(train_files, config=config, base=base)
    val = _read(val_files, config=config, base=base)[0] if val_files else None
    return train, val, names, join_remarks(remark, cache_remark)


def split_files(root: Path, config: ParquetData) -> tuple[list[Path], list[Path], str | None]:
    """Sorted parquet files of the training and the validation split, and a remark about files of neither.

    A file belongs to the split that its name starts with, or else the name of the closest folder above it. If no file
    belongs to a split, all of them are training files.
    """
    if root.is_file():
        return [root], [], None
    groups: dict[str | None, list[Path]] = {}
    prefixes = ("train", *VAL_PREFIXES)
    for file in sorted(root.rglob("*.parquet")):
        parts = file.relative_to(root).parts
        if not any(part.startswith(".") for part in parts):
            matches = (prefix for part in reversed(parts) for prefix in prefixes if part.startswith(prefix))
            groups.setdefault(next(matches, None), []).append(file)
    if not groups:
        raise UserError(
            f"data.path={config.path} contains neither *.parquet files nor a folder written by save_to_disk"
        )
    unassigned = groups.pop(None, [])
    if not groups:
        return unassigned, [], None
    if "train" not in groups:
        other = next(iter(groups.values()))[0].name
        raise UserError(f"data.path={config.path} contains no train*.parquet, only other files such as '{other}'")
    val = next((groups[prefix] for prefix in VAL_PREFIXES if prefix in groups), [])
    remark = f"not used, in no split: {unassigned[0]} ({len(unassigned)} files)" if unassigned else None
    return groups["train"], val, remark


def _read(files: list[Path], *, config: ParquetData, base: Path) -> tuple[ParquetImages, str | None]:
    columns = [name for name in (config.image_column, config.label_column) if name is not None]
    parts = [(str(file.relative_to(base)), pq.read_metadata(file).num_rows) for file in files]
    if not sum(count for _, count in parts):
        raise UserError(f"data.path: '{files[0]}' has no rows")
    remark = None
    try:
        # `datasets` treats paths as patterns, so a folder called "[a]" must be escaped.
        rows = datasets.Dataset.from_parquet([glob.escape(str(file)) for file in files], columns=columns)
    except OSError as error:
        rows = datasets.Dataset(pa.concat_tables(pq.read_table(file, columns=columns) for file in files))
        remark = (
            f"images are kept in memory, because the cache {datasets.config.HF_DATASETS_CACHE} cannot be written "
            f"({error})"
        )
    except DatasetGenerationError as error:
        reason = " ".join(str(error.__cause__).split())
        raise UserError(f"data.path: '{files[0]}' or another file of its split cannot be read ({reason})") from error
    assert isinstance(rows, datasets.Dataset)
    state = str([(os.path.abspath(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    return ParquetImages(rows, config=config, parts=parts, state=state), remark


def check_columns(features: datasets.Features, config: Columns, *, table: str) -> None:
    """Raise `UserError` if the columns of `config` do not exist or have another type."""
    check_columns_exist(config, ("image_column", "label_column"), features, table=table)
    image: Any = features[config.image_column]
    encoded = isinstance(image, datasets.Value) and image.dtype in ("binary", "large_binary", "string")
    if not (encoded or isinstance(image, datasets.Image) or (isinstance(image, dict) and "bytes" in image)):
        raise UserError(
            f"data.image_column={config.image_column} of {table} contains {_type(image)} values; expected encoded "
            "images"
        )
    label: Any = None if config.label_column is None else features[config.label_column]
    integer = isinstance(label, datasets.Value) and "int" in label.dtype
    if not (label is None or integer or isinstance(label, datasets.ClassLabel)):
        raise UserError(
            f"data.label_column={config.label_column} of {table} contains {_type(label)} values; expected integers"
        )


def _type(feature: Any) -> str:
    return getattr(feature, "dtype", None) or str(feature)


def label_names(features: datasets.Features, config: Columns) -> list[str] | None:
    """The class names of a `ClassLabel` column, or None."""
    label = features.get(config.label_column)
    return list(label.names) if isinstance(label, datasets.ClassLabel) else None


def _schema_classes(schema: pa.Schema, *, file: Path) -> list[str] | None:
    """The class names from the schema's metadata key `classes`, a JSON list of strings, or None."""
    text = (schema.metadata or {}).get(b"classes")
    if text is None:
        return None
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"data.path: the metadata key 'classes' of '{file}' is not a JSON list of names")
    return names


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Hide the progress bars of `datasets`, which would overlap with those of the training."""
    were_enabled = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_enabled:
            datasets.enable_progress_bars()
