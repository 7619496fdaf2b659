"""Finds the results of `dino eval` for runs, and makes a table of them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from dino_lightning.checkpoints.load import weights_digest
from dino_lightning.errors import UserError
from dino_lightning.report.markup import Cell, Table, figure
from dino_lightning.report.run_folder import Run, to_finite

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class EvalResult:
    """One metric of one evaluation."""

    eval: str
    metric: str
    value: float
    unit: str
    data: str
    """The dataset: its name, or the last part of its path."""
    trained: bool
    """False for the untrained baseline."""
    checkpoint: Path
    digest: str
    time: str

    @property
    def formatted(self) -> str:
        """The value with its unit, as in a table."""
        return format_figure(self.value, self.unit)

    @property
    def key(self) -> tuple[str, str, str]:
        """Evaluation, metric and dataset; results with the same key are comparable."""
        return self.eval, self.metric, self.data


@dataclass(frozen=True)
class ResultOwner:
    """Decides whether an evaluation is of a run's network."""

    run: Run

    def owns(self, result: EvalResult) -> bool:
        """Compare the evaluated path or, if the folder was moved, the digest of the weights."""
        return self._is_named(result) or (result.trained and result.digest in self.digests)

    def lacks(self, result: EvalResult, owners: Iterable["ResultOwner"]) -> bool:
        """Whether another run has these weights: a relative path such as `0` may match several runs."""
        rivals = [other for other in owners if other is not self and other._is_named(result)]
        return any(result.digest in other.digests for other in rivals) and result.digest not in self.digests

    def _is_named(self, result: EvalResult) -> bool:
        folder, path = self.run.folder.resolve(), result.checkpoint
        if path.is_absolute():
            return path.resolve().is_relative_to(folder)
        return any(folder.parts[-len(part.parts) :] == part.parts for part in (path, *path.parents) if part.parts)

    @cached_property
    def digests(self) -> set[str]:
        """Digests of the weights that the run exported."""
        digests = set()
        for file in self.run.folder.glob("*.safetensors"):
            try:
                digests.add(weights_digest(load_file(file)))
            except (OSError, SafetensorError):  # partially written, or from another program
                continue
        return digests


def find_results(runs: Sequence[Run], folders: Iterable[Path] = ()) -> list[list[EvalResult]]:
    """The results of each run: from `results.jsonl` in its folder, in sibling folders and in `folders`.

    The latest result of a repeated evaluation counts. Raises `UserError` if one of `folders` has no results of these
    runs.
    """
    requested = [(folder, _read_folder(folder)) for folder in folders]
    places = [(folder, folder.parent) for folder in (run.folder.resolve() for run in runs)]
    nearby = dict.fromkeys(file for folder, parent in places for file in (*_files(folder), *_files(parent)[1:]))
    results = [result for path in nearby for result in read_results(path)]
    results += [result for _, results_of_folder in requested for result in results_of_folder]
    by_run, owners = [], [ResultOwner(run) for run in runs]
    for owner in owners:
        owned = [result for result in results if owner.owns(result) and not owner.lacks(result, owners)]
        latest = {(result.key, result.trained): result for result in sorted(owned, key=lambda result: result.time)}
        by_run.append(list(latest.values()))
    for folder, results_of_folder in requested:
        if not any(result in owned for owned in by_run for result in results_of_folder):
            evaluated = ", ".join(dict.fromkeys(str(result.checkpoint) for result in results_of_folder))
            raise UserError(f"results={folder}: its results are not of these runs but of {evaluated}.")
    return by_run


def _files(folder: Path) -> list[Path]:
    return [folder / RESULTS, *sorted(folder.glob(f"*/{RESULTS}"))]


def _read_folder(path: Path) -> list[EvalResult]:
    results = [result for file in ([path] if path.is_file() else _files(path)) for result in read_results(file)]
    if not results:
        raise UserError(f"results={path}: expected a {RESULTS} written by dino eval, or a folder that contains one.")
    return results


def read_results(path: Path) -> list[EvalResult]:
    """The results in a file; invalid lines, such as a partially written one, are skipped."""
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError:  # missing or not readable
        return []
    results = []
    for line in lines:
        try:
            results.append(_result(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return results


def _result(line: dict[str, Any]) -> EvalResult:
    value = to_finite(line["value"])
    if value is None:
        raise ValueError("not a number")
    data = line["config"].get("data") or {}
    name = data.get("path") or data.get("name") or ("built in" if "draw_seed" in data else "")
    return EvalResult(
        eval=str(line["eval"]),
        metric=str(line["metric"]),
        value=value,
        unit=str(line["unit"]),
        data=Path(str(name)).name,
        trained=bool(line["trained"]),
        checkpoint=Path(str(line["checkpoint"])).expanduser(),
        digest=str(line["checkpoint_digest"]),
        time=str(line["time"]),
    )


def format_figure(value: float, unit: str) -> str:
    """A value with its unit, as in a table."""
    return f"{value:.1f} %" if unit == "%" else f"{value:.4g} {unit}".rstrip()


def evaluation_table(results: Sequence[Sequence[EvalResult]], labels: Sequence[str]) -> Table | None:
    """A row for each figure and a column for each run that has any, then for untrained networks; None without any."""
    keys = list(dict.fromkeys(result.key for results_of_run in results for result in results_of_run))
    if not keys:
        return None
    columns = []
    for trained in (True, False):
        for label, results_of_run in zip(labels, results, strict=True):
            by_key = {result.key: result for result in results_of_run if result.trained is trained}
            name = label if trained else "untrained" if len(labels) == 1 else f"{label}, untrained"
            columns += [(name, by_key)] if by_key else []
    rows = []
    for key in keys:
        column_results = [by_key.get(key) for _, by_key in columns]
        cells = [Cell(figure(result.value, result.formatted) if result else "", "figure") for result in column_results]
        rows.append([*map(Cell, key), *cells])
    return Table(["Evaluation", "Figure", "Images", *(name for name, _ in columns)], rows)
