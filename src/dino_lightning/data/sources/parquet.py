"""Parquet files in the Hugging Face image layout, and folders written by `save_to_disk`.

Rows come from `datasets`' memory-mapped Arrow files: the first run converts the parquet files into its cache
(`HF_DATASETS_CACHE`), later ones open in a tenth of a second, and the memory is shared between processes. Reading the
parquet files with pyarrow alone needs all encoded images in the memory of every process, so it is the way out only
where the cache cannot be written.
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
from dino_lightning.data.sources.base import Splits, content_digest
from dino_lightning.data.sources.folder import existing_path
from dino_lightning.errors import UserError, did_you_mean

Columns = ParquetData | HuggingFaceData
"""What has `image_column` and `label_column`."""
VAL_PREFIXES = ("val", "test")
"""Beginnings of a validation split's name, in the order in which they are looked for (`val` finds `validation`)."""
MOST_CLASSES = 1_000_000
"""More is taken for a column of identifiers."""


class ParquetImages:
    """The rows of one split. `labels` is int64 (n,), -1 where the row has none; None for no labels at all.

    `parts` names the files that hold the rows and their row counts, in order, for `describe`. `state` changes when the
    rows do; None for the fingerprint that `datasets` gives them.
    """

    def __init__(
        self, rows: datasets.Dataset, *, config: Columns, parts: list[tuple[str, int]], state: str | None = None
    ):
        image_type = datasets.Image(decode=False)  # decoded here: `datasets` would apply the EXIF rotation
        self._images = rows.select_columns([config.image_column]).cast_column(config.image_column, image_type)
        self._column = config.image_column
        self._parts = parts
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
        """The encoded image. Raises `ValueError` where the row has none."""
        encoded = self._images[int(index)][self._column] or {}
        if encoded.get("bytes") is not None:
            return encoded["bytes"]
        if encoded.get("path") is None:
            raise ValueError("the row has no image")
        return Path(encoded["path"]).read_bytes()

    def describe(self, index: int) -> str:
        """File and row in it."""
        row = int(index)
        for name, count in self._parts:
            if row < count:
                return f"{name} row {row}"
            row -= count
        raise IndexError(index)

    def fingerprint(self) -> str:
        """Of the files' paths, sizes and times, or of `datasets`' own, and of the column."""
        return content_digest(self._state.encode(), self._column.encode())


def open_parquet(config: ParquetData) -> Splits:
    """Training images, validation images where there are labeled ones, and what the user should know."""
    root = existing_path(config.path)
    saved = any((root / name).is_file() for name in ("state.json", "dataset_dict.json"))
    with _silent():
        train, val, names, notice = _open_saved(root, config) if saved else _open_files(root, config)
    return with_classes(train, val, names=names, notice=notice, config=config)


def with_classes(
    train: ParquetImages, val: ParquetImages | None, *, names: list[str] | None, notice: str | None, config: Columns
) -> Splits:
    """Give both the class names; `val` without labels goes. Raises `UserError` for labels beyond them."""
    if train.labels is None:
        return Splits(train, None, _join(notice, "no labels: no k-NN evaluation"))
    if val is not None and val.labels is None:
        val, notice = None, _join(notice, "the validation split has no labels and is not used")
    lowest = min(int(part.labels.min()) for part in (train, val) if part is not None and part.labels is not None)
    if lowest < -1:
        raise UserError(
            f"data.label_column={config.label_column} holds the label {lowest}; class numbers from 0 are "
            "expected, and -1 or nothing for an image without one"
        )
    top = max(int(part.labels.max()) for part in (train, val) if part is not None and part.labels is not None)
    if top >= (len(names) if names else MOST_CLASSES):
        known = f"there are {len(names)} class names" if names else "class numbers from 0 are expected"
        raise UserError(f"data.label_column={config.label_column} holds the label {top}, but {known}")
    train.classes = names or [str(label) for label in range(top + 1)]
    if val is not None:
        val.classes = train.classes
    return Splits(train, val, notice)


Opened = tuple[ParquetImages, ParquetImages | None, list[str] | None, str | None]
"""Training images, validation images, class names, notice."""


def _open_saved(root: Path, config: ParquetData) -> Opened:
    """A `Dataset` (all of it trains) or a `DatasetDict` from `save_to_disk`."""
    saved = datasets.load_from_disk(str(root))
    splits = dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if "train" not in splits:
        raise UserError(f"data.path={config.path} has the splits {', '.join(map(str, splits))}; 'train' is missing")
    val_name = next((str(name) for start in VAL_PREFIXES for name in splits if str(name).startswith(start)), None)
    opened = {}
    for name in filter(None, ("train", val_name)):
        rows = splits[name]
        check_columns(rows.features, config, where=f"the split '{name}'")
        if not len(rows):
            raise UserError(f"data.path={config.path}: the split '{name}' has no rows")
        opened[name] = ParquetImages(rows, config=config, parts=[(f"{root.name} {name}", len(rows))])
    return opened["train"], opened.get(val_name), label_names(splits["train"].features, config), None


def _open_files(root: Path, config: ParquetData) -> Opened:
    train_files, val_files, notice = split_files(root, config)
    names = None
    for file in [*train_files, *val_files]:
        try:
            schema = pq.read_schema(file)
            features = datasets.Features.from_arrow_schema(schema)
        except Exception as error:  # of Arrow, and of `datasets`, which reads its own words in the file
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"data.path: '{file}' is not a parquet file that can be read ({reason})") from error
        check_columns(features, config, where=f"'{file}'")
        if names is None:
            names = label_names(features, config) or _schema_classes(schema, file=file)
    base = root if root.is_dir() else root.parent
    train, trouble = _read(train_files, config=config, base=base)
    val = _read(val_files, config=config, base=base)[0] if val_files else None
    return train, val, names, _join(notice, trouble)


def split_files(root: Path, config: ParquetData) -> tuple[list[Path], list[Path], str | None]:
    """Parquet files of the training and the validation split, sorted, and a notice of those that belong to neither.

    A file belongs to the split with which its name begins, else to that of the closest folder above it. Where no file
    belongs to any, all of them train.
    """
    if root.is_file():
        return [root], [], None
    groups: dict[str | None, list[Path]] = {}
    for file in sorted(root.rglob("*.parquet")):
        inside = file.relative_to(root).parts
        if not any(part.startswith(".") for part in inside):
            starts = (
                start for part in reversed(inside) for start in ("train", *VAL_PREFIXES) if part.startswith(start)
            )
            groups.setdefault(next(starts, None), []).append(file)
    if not groups:
        raise UserError(f"data.path={config.path} holds neither *.parquet files nor a folder written by save_to_disk")
    loose = groups.pop(None, [])
    if not groups:
        return loose, [], None
    if "train" not in groups:
        found = next(iter(groups.values()))[0].name
        raise UserError(f"data.path={config.path} has no train*.parquet, only files such as '{found}'")
    val = next((groups[start] for start in VAL_PREFIXES if start in groups), [])
    return groups["train"], val, f"not used, of no split: {loose[0]} ({len(loose)} such)" if loose else None


def _read(files: list[Path], *, config: ParquetData, base: Path) -> tuple[ParquetImages, str | None]:
    columns = [name for name in (config.image_column, config.label_column) if name is not None]
    parts = [(str(file.relative_to(base)), pq.read_metadata(file).num_rows) for file in files]
    if not sum(count for _, count in parts):
        raise UserError(f"data.path: '{files[0]}' has no rows")
    trouble = None
    try:
        # `datasets` takes paths for patterns; escaped, a folder called "[a]" is found.
        rows = datasets.Dataset.from_parquet([glob.escape(str(file)) for file in files], columns=columns)
    except OSError as error:
        rows = datasets.Dataset(pa.concat_tables(pq.read_table(file, columns=columns) for file in files))
        trouble = (
            f"images are kept in memory, the cache {datasets.config.HF_DATASETS_CACHE} cannot be written ({error})"
        )
    except DatasetGenerationError as error:
        reason = " ".join(str(error.__cause__).split())
        raise UserError(f"data.path: '{files[0]}' and its split cannot be read ({reason})") from error
    assert isinstance(rows, datasets.Dataset)
    return ParquetImages(rows, config=config, parts=parts, state=_state(files)), trouble


def _state(files: list[Path]) -> str:
    """Path, size and time of each file."""
    return str([(os.path.abspath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files])


def check_columns(features: datasets.Features, config: Columns, *, where: str) -> None:
    """Raises `UserError` where the columns of `config` are not there or hold something else."""
    for key in ("image_column", "label_column"):
        name = getattr(config, key)
        if name is not None and name not in features:
            off = "; null for no labels" if key == "label_column" else ""
            raise UserError(f"data.{key}={name} is not a column of {where}; {did_you_mean(name, features)}{off}")
    image: Any = features[config.image_column]
    encoded = isinstance(image, datasets.Value) and image.dtype in ("binary", "large_binary", "string")
    if not (encoded or isinstance(image, datasets.Image) or (isinstance(image, dict) and "bytes" in image)):
        raise UserError(
            f"data.image_column={config.image_column} of {where} does not hold encoded images but {_type(image)}"
        )
    label: Any = None if config.label_column is None else features[config.label_column]
    whole = isinstance(label, datasets.Value) and "int" in label.dtype
    if not (label is None or whole or isinstance(label, datasets.ClassLabel)):
        raise UserError(
            f"data.label_column={config.label_column} of {where} does not hold whole numbers but {_type(label)}"
        )


def _type(feature: Any) -> str:
    return getattr(feature, "dtype", None) or str(feature)


def label_names(features: datasets.Features, config: Columns) -> list[str] | None:
    """Class names where the label column knows them."""
    label = features.get(config.label_column)
    return list(label.names) if isinstance(label, datasets.ClassLabel) else None


def _schema_classes(schema: pa.Schema, *, file: Path) -> list[str] | None:
    """Class names from the schema's metadata key `classes`, a JSON list of strings."""
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


def _join(*notices: str | None) -> str | None:
    return "; ".join(filter(None, notices)) or None


@contextmanager
def _silent() -> Iterator[None]:
    """Without the progress bars of `datasets`, which would run into those of the training."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
