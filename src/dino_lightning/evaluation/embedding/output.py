"""Features in a file: `.parquet`, or `.npy` with the names beside it in a `.csv`.

A file is there as a whole or not at all, and equal features make equal files.
"""

import csv
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dino_lightning.evaluation.embedding.result import Embeddings
from dino_lightning.runtime.files import atomic_file

SUFFIXES = (".parquet", ".npy")
ROW_GROUP = 8192
"""Rows that a reader of the `.parquet` has to read together."""


def files_of(output: Path) -> list[Path]:
    """The files that stand for `output`."""
    return [output] if output.suffix == ".parquet" else [output, output.with_suffix(".csv")]


def write_embeddings(found: Embeddings, output: Path, *, about: dict[str, str]) -> None:
    """Write features and names; `about` says what made them, for the metadata of a `.parquet`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".parquet":
        with atomic_file(output) as file:
            pq.write_table(_table(found).replace_schema_metadata(about), file, row_group_size=ROW_GROUP)
        return
    # The table last: where it is, the features are.
    with atomic_file(output) as file:
        np.save(file, found.features)
    with atomic_file(output.with_suffix(".csv")) as file:
        text = io.StringIO(newline="")
        columns = _columns(found)
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(columns)
        rows.writerows(zip(*columns.values(), strict=True))
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))  # names of files need not be UTF-8


def _columns(found: Embeddings) -> dict[str, list[str]] | dict[str, list[str | None]]:
    """What is known of each row, without columns that would say nothing."""
    columns = {"name": found.names, "label": found.labels, "split": found.splits}
    return {name: values for name, values in columns.items() if values is not None}  # type: ignore[return-value]


def _table(found: Embeddings) -> pa.Table:
    columns = {
        name: pa.array([None if value is None else _in_utf8(value) for value in values], pa.string())
        for name, values in _columns(found).items()
    }
    flat = pa.array(np.ascontiguousarray(found.features).reshape(-1))
    return pa.table(columns | {"embedding": pa.FixedSizeListArray.from_arrays(flat, found.features.shape[1])})


def _in_utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
