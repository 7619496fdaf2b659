"""Results of `dino eval` that belong to runs: where they lie, and the table of them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from dino_lightning.checkpoints.load import weights_digest
from dino_lightning.errors import UserError
from dino_lightning.report.markup import Cell, table
from dino_lightning.report.run_folder import Run, to_finite

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class EvalResult:
    """One figure of one evaluation."""

    eval: str
    metric: str
    value: float
    unit: str
    data: str
    """Which images: a name, or the last part of a path."""
    trained: bool
    """False for the untrained network that it is compared with."""
    checkpoint: Path
    digest: str
    time: str

    @property
    def formatted(self) -> str:
        """The value with its unit, as in a table."""
        return f"{self.value:.1f} %" if self.unit == "%" else f"{self.value:.4g} {self.unit}".rstrip()

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes figures of several networks comparable."""
        return self.eval, self.metric, self.data


@dataclass(frozen=True)
class ResultOwner:
    """A run, asked whether an evaluation is of its network."""

    run: Run

    def owns(self, result: EvalResult) -> bool:
        """By the path that was evaluated or, where the folder has moved since, by the weights themselves."""
        return self._is_named(result) or (result.trained and result.digest in self.digests)

    def lacks(self, result: EvalResult, owners: Iterable["ResultOwner"]) -> bool:
        """Whether another has these weights: a relative path such as `0` may lead to either of them."""
        rivals = [other for other in owners if other is not self and other._is_named(result)]
        return any(result.digest in other.digests for other in rivals) and result.digest not in self.digests

    def _is_named(self, result: EvalResult) -> bool:
        folder, path = self.run.folder.resolve(), result.checkpoint
        if path.is_absolute():
            return path.resolve().is_relative_to(folder)
        return any(folder.parts[-len(part.parts) :] == part.parts for part in (path, *path.parents) if part.parts)

    @cached_property
    def digests(self) -> set[str]:
        """Of the weights that the run has exported."""
        found = set()
        for file in self.run.folder.glob("*.safetensors"):
            try:
                found.add(weights_digest(load_file(file)))
            except (OSError, SafetensorError):  # half written, or another's
                continue
        return found


def find_results(runs: Sequence[Run], given: Iterable[Path] = ()) -> list[list[EvalResult]]:
    """For each run its results: of `results.jsonl` in it, in folders beside it and in the given ones.

    Of an evaluation that was done twice, the later counts. Raises `UserError` where a given folder has no results, or
    none of these runs.
    """
    asked = [(folder, _read_given(folder)) for folder in given]
    beside = dict.fromkeys(path for run in runs for path in _files_beside(run.folder.resolve()))
    known = [result for path in beside for result in read_results(path)]
    found, owners = [], [ResultOwner(run) for run in runs]
    for owner in owners:
        own = [result for result in known + [r for _, some in asked for r in some] if owner.owns(result)]
        own = [result for result in own if not owner.lacks(result, owners)]
        latest = {(result.key, result.trained): result for result in sorted(own, key=lambda result: result.time)}
        found.append(list(latest.values()))
    for folder, some in asked:
        if not any(result in own for own in found for result in some):
            evaluated = ", ".join(dict.fromkeys(str(result.checkpoint) for result in some))
            raise UserError(f"--results {folder}: none of its results is of these runs; they are of {evaluated}")
    return found


def _files_beside(folder: Path) -> list[Path]:
    return [folder / RESULTS, *sorted(folder.glob(f"*/{RESULTS}")), *sorted(folder.parent.glob(f"*/{RESULTS}"))]


def _read_given(path: Path) -> list[EvalResult]:
    files = [path] if path.is_file() else [path / RESULTS, *sorted(path.glob(f"*/{RESULTS}"))]
    found = [result for file in files for result in read_results(file)]
    if not found:
        raise UserError(f"results={path}: expected a {RESULTS} of dino eval, or a folder with one in it.")
    return found


def read_results(path: Path) -> list[EvalResult]:
    """The figures of a file; lines that are no results, such as one half written, are left out."""
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError:  # there is none, or it is somebody else's
        return []
    found = []
    for line in lines:
        try:
            found.append(_result(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def _result(line: dict[str, Any]) -> EvalResult:
    value = to_finite(line["value"])
    if value is None:
        raise ValueError("not a number")
    data = line["config"].get("data") or {}
    named = data.get("path") or data.get("name") or ("built in" if "draw_seed" in data else "")
    return EvalResult(
        eval=str(line["eval"]),
        metric=str(line["metric"]),
        value=value,
        unit=str(line["unit"]),
        data=Path(str(named)).name,
        trained=bool(line["trained"]),
        checkpoint=Path(str(line["checkpoint"])).expanduser(),
        digest=str(line["checkpoint_digest"]),
        time=str(line["time"]),
    )


def results_html(results: Sequence[Sequence[EvalResult]], names: Sequence[str]) -> str:
    """A table with a row for each figure and a column for each run that has any; then the untrained networks."""
    rows = list(dict.fromkeys(result.key for some in results for result in some))
    if not rows:
        return (
            '<p class="soft">There are no evaluations yet: <code>dino eval RUN</code> writes one, and '
            "<code>dino report RUN</code> then adds it here.</p>"
        )
    columns = []
    for trained in (True, False):
        for name, some in zip(names, results, strict=True):
            own = {result.key: result for result in some if result.trained is trained}
            called = name if trained else "untrained" if len(names) == 1 else f"{name}, untrained"
            columns += [(called, own)] if own else []
    header = ["Evaluation", "Figure", "Images", *(name for name, _ in columns)]
    body = []
    for row in rows:
        values = [found.get(row) for _, found in columns]
        body.append([Cell(escape(word)) for word in row] + [_cell(value) for value in values])
    return table("Evaluations", header, body)


def _cell(result: EvalResult | None) -> Cell:
    return Cell(
        "" if result is None else f'<data value="{result.value!r}">{escape(result.formatted)}</data>', figure=True
    )
