"""`metrics.csv`: one row per logged step. A kill never leaves a partial row, and a resumed run continues the file."""

import csv
import errno
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from dino_lightning.runtime.console import warn
from dino_lightning.runtime.files import write_atomically

METRICS_FILE = "metrics.csv"


class MetricsCSVLogger(CSVLogger):
    """Lightning's CSV logger, but a resumed run keeps its rows and the header changes atomically."""

    def __init__(self, output: Path, *, before_step: int | None = None) -> None:
        """Keep existing rows before optimizer step `before_step`, where the run resumes; None starts a new file."""
        super().__init__(save_dir=output, name="", version="")
        self.before_step = before_step

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the rows."""
        if not isinstance(self._experiment, _AtomicWriter):
            self._experiment = _AtomicWriter(Path(self.log_dir), before_step=self.before_step)
        return self._experiment


class _AtomicWriter(ExperimentWriter):
    def __init__(self, folder: Path, *, before_step: int | None) -> None:
        super().__init__(log_dir=str(folder))
        self.path = folder / METRICS_FILE
        self.has_unwritten_rows = False
        """Whether the latest rows could not be written and are still in memory."""
        rows = [] if before_step is None else [row for row in read_rows(self.path) if int(row["step"]) < before_step]
        self.metrics_keys = sorted(set().union(*rows))
        if rows:
            write_atomically(self.path, _to_csv(self.metrics_keys, rows))
        else:
            self.path.unlink(missing_ok=True)

    def _check_log_dir_exists(self) -> None:
        """Do nothing: Lightning would delete the file here."""

    def save(self) -> None:
        """Append the rows logged since the last call. If the disk is full, they stay in memory until the next call."""
        if not self.metrics:
            return
        keys = sorted({*self.metrics_keys, *(key for row in self.metrics for key in row)})
        try:
            if keys != self.metrics_keys or not self.path.exists():
                rows = [*read_rows(self.path), *self.metrics]
                write_atomically(self.path, _to_csv(keys, rows))
            else:
                _append(self.path, _to_csv(keys, self.metrics, header=False).encode())
        except OSError as error:
            if not self.has_unwritten_rows:
                reason = error.strerror or error
                warn(f"{self.path} could not be written ({reason}); rows stay in memory and training continues.")
            self.has_unwritten_rows = True
            return
        self.metrics_keys, self.metrics, self.has_unwritten_rows = keys, [], False


def _append(path: Path, rows: bytes) -> None:
    """Append rows in a single write, which a kill cannot split; a full disk leaves no partial row."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(rows) < len(rows):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows without empty fields; a truncated last row is skipped."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row and None not in row.values()]
    return [{key: value for key, value in row.items() if value != ""} for row in rows if row.get("step", "").isdigit()]


def has_row(path: Path, *, step: int, keys: Iterable[str]) -> bool:
    """Whether one row of a step has all these columns."""
    columns = set(keys)
    return any(int(row["step"]) == step and columns <= row.keys() for row in read_rows(path))


def _to_csv(keys: list[str], rows: Iterable[Mapping[str, Any]], *, header: bool = True) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=keys, lineterminator=os.linesep)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
