"""The result of `embed`, and its file: `.parquet`, or `.npy` with the names in a `.csv` of the same name.

Files are written completely or not at all, and equal features give equal files.
"""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dino_lightning.data.decode import Decoder
from dino_lightning.data.sources.base import ImageSource
from dino_lightning.runtime.files import atomic_file

SUFFIXES = (".parquet", ".npy")
ROW_GROUP = 8192
"""Rows per row group of the `.parquet`, which are read together."""


@dataclass(frozen=True)
class Embeddings:
    """Features of N readable images, in the order of their source."""

    features: np.ndarray
    """(N, D) float32."""
    names: list[str]
    """Path, index in the list, or the name that the source gives to an image."""
    labels: list[str | None] | None
    """Name of the class, None for an unlabeled image; None instead of the list if all images are unlabeled."""
    splits: list[str] | None
    """`train` or `val`; None if there is only one split."""
    bad: dict[str, str]
    """Name -> reason of the unreadable images, which are left out."""
    output: Path | None
    """The file."""
    positions: np.ndarray
    """(N,) int64: the index of each image in its split, counting the unreadable ones."""
    sources: Mapping[str, ImageSource] = field(repr=False)
    """Split -> its images."""
    decoder: Decoder = field(repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def image(self, row: int) -> Image.Image:
        """The image of a row, read again, in RGB or gray; for networks with 1 or 3 channels."""
        split = self.splits[row] if self.splits else next(iter(self.sources))
        return self.decoder.pil(self.sources[split].read(int(self.positions[row])))


def files_of(output: Path) -> list[Path]:
    """The files that are written for `output`."""
    return [output] if output.suffix == ".parquet" else [output, output.with_suffix(".csv")]


def write_embeddings(embeddings: Embeddings, output: Path, *, metadata: dict[str, str]) -> None:
    """Write features and names; `metadata` is that of a `.parquet`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".parquet":
        with atomic_file(output) as file:
            pq.write_table(_table(embeddings).replace_schema_metadata(metadata), file, row_group_size=ROW_GROUP)
        return
    # The table is last: if it exists, so do the features.
    with atomic_file(output) as file:
        np.save(file, embeddings.features)
    with atomic_file(output.with_suffix(".csv")) as file:
        text = io.StringIO(newline="")
        columns = _columns(embeddings)
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(columns)
        rows.writerows(zip(*columns.values(), strict=True))
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))  # file names need not be UTF-8


def _columns(embeddings: Embeddings) -> dict[str, list[str]] | dict[str, list[str | None]]:
    """Name, label and split of each row, without the columns that are unknown."""
    columns = {"name": embeddings.names, "label": embeddings.labels, "split": embeddings.splits}
    return {name: values for name, values in columns.items() if values is not None}  # type: ignore[return-value]


def _table(embeddings: Embeddings) -> pa.Table:
    columns = {
        name: pa.array([None if value is None else _to_utf8(value) for value in values], pa.string())
        for name, values in _columns(embeddings).items()
    }
    flat = pa.array(np.ascontiguousarray(embeddings.features).reshape(-1))
    return pa.table(columns | {"embedding": pa.FixedSizeListArray.from_arrays(flat, embeddings.features.shape[1])})


def _to_utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
