"""Datasets of the Hugging Face Hub, downloaded first or streamed, through the `datasets` library."""

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import fsspec
import fsspec.asyn
from torch.utils.data import get_worker_info

from dino_lightning.config import HuggingFaceData
from dino_lightning.config.paths import usable_path
from dino_lightning.data.sources.base import Sample, Splits
from dino_lightning.data.sources.parquet import ParquetImages, check_columns, label_names, with_classes
from dino_lightning.data.sources.registry import register_source
from dino_lightning.errors import UserError, did_you_mean

READ_BATCH_SIZE = 16
"""Rows read from `datasets` in one call; a small number keeps few encoded images in memory."""


class HubStream:
    """The rows of a streamed split; its shards are the files that `datasets` reports."""

    def __init__(self, rows: datasets.IterableDataset, *, config: HuggingFaceData, images: int):
        columns = [name for name in (config.image_column, config.label_column) if name is not None]
        image_type = datasets.Image(decode=False)  # because `datasets` would apply the EXIF rotation
        self._rows = rows.select_columns(columns).cast_column(config.image_column, image_type)
        self._image, self._label = config.image_column, config.label_column
        self._name = f"{config.name} {config.train_split}"
        self.images = images
        self.classes = label_names(rows.features or datasets.Features(), config)

    @property
    def shards(self) -> int:
        """Number of files or other shards."""
        return self._rows.num_shards

    def read_shard(self, shard: int, *, start: int = 0) -> Iterator[Sample]:
        """The rows from number `start` on. If the shard cannot be read to its end, the last sample says so."""
        if get_worker_info() is not None:
            fsspec.asyn.reset_lock()  # a lock that was held during the fork would never be released
        rows = self._rows.shard(num_shards=self.shards, index=shard).skip(start)
        number = start
        try:
            # Unlike `rows.iter`, `iter(rows)` would split the shards among torch's loader processes a second time.
            for batch in rows.iter(batch_size=READ_BATCH_SIZE):
                images = batch[self._image]
                labels = [None] * len(images) if self._label is None else batch[self._label]
                for encoded, label in zip(images, labels, strict=True):
                    yield self._sample(encoded or {}, label, name=f"{self._name} shard {shard} row {number}")
                    number += 1
        except Exception as error:  # the formats and file systems raise many kinds of errors
            name = f"{self._name} shard {shard} (unreadable after {number} rows: {type(error).__name__}: {error})"
            yield Sample(None, -1, name)

    @staticmethod
    def _sample(encoded: dict[str, Any], label: int | None, *, name: str) -> Sample:
        content = encoded.get("bytes")
        if content is None and encoded.get("path") is not None:
            try:
                with fsspec.open(encoded["path"], "rb") as file:
                    content = file.read()  # type: ignore[union-attr]
            except (OSError, ValueError) as error:
                name = f"{name} ({error})"
        return Sample(content, -1 if label is None else int(label), name)


@register_source("huggingface", HuggingFaceData)
def open_huggingface(config: HuggingFaceData) -> Splits:
    """Training images, or a stream of them, and the labeled validation images of `val_split`."""
    if config.streaming:
        return Splits(_open_stream(config), None, "read as a stream: no k-NN evaluation")
    rows = _load(config, split=config.train_split, key="train_split")
    train = _images(rows, config, split=config.train_split)
    val, names = None, label_names(rows.features, config)
    if config.val_split is not None and config.label_column is not None:
        val_rows = _load(config, split=config.val_split, key="val_split")
        val = _images(val_rows, config, split=config.val_split)
    return with_classes(train, val, names=names, remark=None, config=config)


def _open_stream(config: HuggingFaceData) -> HubStream:
    rows = _load(config, split=config.train_split, key="train_split")
    if rows.features is None:
        raise UserError(f"data.name={config.name} does not list its columns; set data.streaming=false")
    check_columns(rows.features, config, table=f"'{config.name}'")
    info = (rows.info.splits or {}).get(config.train_split)
    images = config.images or (info.num_examples if info is not None else None)
    if not images:
        raise UserError(
            f"data.name={config.name} does not state its number of images; set data.images to the images per epoch, at "
            "least 1"
        )
    return HubStream(rows, config=config, images=images)


def _images(rows: datasets.Dataset, config: HuggingFaceData, *, split: str) -> ParquetImages:
    check_columns(rows.features, config, table=f"the split '{split}'")
    if not len(rows):
        raise UserError(f"data.name={config.name}: the split '{split}' has no rows")
    return ParquetImages(rows, config=config, parts=[(f"{config.name} {split}", len(rows))])


def _load(config: HuggingFaceData, *, split: str, key: str) -> Any:
    """A `Dataset`, or an `IterableDataset` if streaming."""
    local = usable_path("data.name", config.name)
    name = str(local) if local.exists() else config.name
    try:
        return datasets.load_dataset(name, config.subset, split=split, streaming=config.streaming)
    except Exception as error:  # builders, the Hub and file systems raise many kinds of errors
        raise UserError(_reason(name, config, split=split, key=key, error=error)) from error


def _reason(name: str, config: HuggingFaceData, *, split: str, key: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError | ConnectionError):
        missing = f"data.name={config.name} is not a folder of images and was not found on the Hugging Face Hub"
        return f"{missing} ({_first_line(error)}); check the name and the network connection"
    if isinstance(error, ValueError):
        subsets = _names_or_none(datasets.get_dataset_config_names, name)
        if subsets and (config.subset or "default") not in subsets and (config.subset or len(subsets) > 1):
            hint = did_you_mean(config.subset or "", subsets)
            return f"data.subset={config.subset} is not a subset of '{config.name}'; {hint}"
        splits = _names_or_none(datasets.get_dataset_split_names, name, config.subset)
        if splits and split not in splits:
            return f"data.{key}={split} is not a split of '{config.name}'; {did_you_mean(split, splits)}"
    return f"data.name={config.name} cannot be read ({_first_line(error.__cause__ or error)})"


def _names_or_none(query: Callable[..., list[str]], *args: Any) -> list[str]:
    """The names, or an empty list if the query fails: an error message must not cause another error."""
    try:
        return query(*args)
    except Exception:
        return []


def _first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
