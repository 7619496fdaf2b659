"""Reads the files of a run's folder, from which reports are made. Any file may be missing."""

import csv
import io
import json
import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from dino_lightning.config.dotted import get_dotted
from dino_lightning.errors import UserError
from dino_lightning.runtime.files import FAILED

Curve: TypeAlias = list[tuple[int, float]]
"""(step, value) pairs, sorted by step."""
Sheets: TypeAlias = list[tuple[int | None, Path]]
"""(epoch, file) pairs, sorted by epoch; the epoch is None for the end of the run, which is last."""


@dataclass(frozen=True)
class Run:
    """The content of a run's folder; fields of missing files are empty."""

    folder: Path
    name: str
    summary: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    curves: dict[str, Curve]
    """Column of `metrics.csv` -> its values."""
    epochs: list[tuple[int, int]]
    """(first step, epoch) pairs; epochs are counted from 1."""
    sheets: dict[str, Sheets]
    """Kind of picture -> its sheets."""
    failure: str | None
    """First line of `failed.txt`, if there is one."""

    def number(self, key: str) -> float | None:
        """A finite number of the summary, or None."""
        return to_finite(self.summary.get(key))

    @property
    def title(self) -> str:
        """The experiment, or the folder's name if it is unknown."""
        return str(self.summary.get("experiment") or self.setting("experiment") or self.name)

    @property
    def knn(self) -> float | None:
        """k-NN top-1 in percent: the final one, or the latest so far."""
        final = self.number("knn_top1")
        return self.last_value("knn/top1") if final is None else final

    def last_value(self, *columns: str) -> float | None:
        """The last value of the first of these columns that has any, or None."""
        return next((self.curves[column][-1][1] for column in columns if self.curves.get(column)), None)

    def setting(self, key: str) -> Any:
        """A setting by its dotted key; None if the configuration does not have it."""
        return get_dotted(self.config, key)


def to_finite(value: Any) -> float | None:
    """A number, or its text, as a finite float; None for anything else, including infinity and NaN."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def read_run(run_dir: Path, *, allow_partial: bool = False) -> Run:
    """Read `metrics.csv`, `summary.json`, `config.yaml` and the names of `pictures/*.png`.

    Raises `UserError` if the folder does not exist or `summary.json` is not a JSON object; with `allow_partial`, a
    partially written file counts as missing.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: expected the folder of a run, with metrics.csv and summary.json.")
    config_text = _text(run_dir / "config.yaml")
    rows = list(csv.DictReader(io.StringIO(_text(run_dir / "metrics.csv"))))
    failure = (_text(run_dir / FAILED).splitlines() or ["without a reason"])[0].strip()
    return Run(
        folder=run_dir,
        name=run_dir.resolve().name,
        summary=_read_summary(run_dir / "summary.json", allow_partial=allow_partial),
        config=_parse_config(config_text),
        config_text=config_text,
        curves=_read_curves(rows),
        epochs=_read_epochs(rows),
        sheets=_read_sheets(run_dir / "pictures"),
        failure=failure if (run_dir / FAILED).exists() else None,
    )


def _text(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.exists() else ""


def _read_summary(path: Path, *, allow_partial: bool) -> dict[str, Any]:
    try:
        summary = json.loads(_text(path) or "{}")
    except json.JSONDecodeError as error:
        if allow_partial:
            return {}
        text = f"{path}: expected JSON, but {error}; delete the file to make the report without it."
        raise UserError(text) from error
    if not isinstance(summary, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(summary).__name__}.")
    return summary


def _parse_config(text: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:  # the report still shows the text
        return {}
    return config if isinstance(config, dict) else {}


def _read_curves(rows: list[dict[str, Any]]) -> dict[str, Curve]:
    columns: dict[str, dict[int, float]] = {}
    for row in rows:
        step = to_finite(row.get("step"))
        for name, cell in row.items():
            value = to_finite(cell)
            if step is not None and value is not None and name not in ("step", "epoch"):
                columns.setdefault(name, {})[int(step)] = value  # a resumed run may repeat steps; the later row counts
    return {name: sorted(points.items()) for name, points in columns.items()}


def _read_epochs(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    pairs = [(to_finite(row.get("step")), to_finite(row.get("epoch"))) for row in rows]
    known = sorted((int(step), int(epoch) + 1) for step, epoch in pairs if step is not None and epoch is not None)
    return known[:1] + [after for before, after in pairwise(known) if after[1] != before[1]]


def _read_sheets(folder: Path) -> dict[str, Sheets]:
    sheets: dict[str, Sheets] = {}
    for path in sorted(folder.glob("*.png")):
        numbered = re.fullmatch(r"(.+)_epoch(\d+)", path.stem, re.DOTALL)
        name, epoch = (numbered[1], int(numbered[2])) if numbered else (path.stem, None)
        sheets.setdefault(name, []).append((epoch, path))
    return {
        name: sorted(of_name, key=lambda sheet: math.inf if sheet[0] is None else sheet[0])
        for name, of_name in sheets.items()
    }
