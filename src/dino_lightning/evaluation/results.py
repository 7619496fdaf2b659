"""Results on disk, one JSON line for each figure, and on the screen, as a table."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from dino_lightning.evaluation.context import Result, Task


@dataclass
class ResultsFile:
    """`results.jsonl`: a line of an evaluation stays when the next one is appended."""

    path: Path
    eval: str
    checkpoint: str
    """As the user named it."""
    config: dict[str, Any]
    """The whole configuration, plain types only."""
    environment: dict[str, Any]
    """Commit, versions, machine."""

    def append(self, result: Result, task: Task, *, seconds: float) -> None:
        """One line; `seconds` since the evaluation of this network began."""
        line = {
            "eval": self.eval,
            "metric": result.metric,
            "value": result.value,
            "unit": result.unit,
            "network": task.network.name,
            "trained": task.network.trained,
            "checkpoint": self.checkpoint,
            "checkpoint_digest": task.network.digest,
            "details": result.details,
            "seconds": round(seconds, 3),
            "device": str(task.runtime.device),
            "world_size": task.runtime.fabric.world_size,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "environment": self.environment,
            "config": self.config,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(line, allow_nan=True) + "\n"
        # One write to a file opened for appending: lines of evaluations that run side by side do not mix.
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, text.encode())
        finally:
            os.close(handle)


def results_table(title: str, columns: Sequence[tuple[str, Sequence[Result]]]) -> Table:
    """The main results: a row for each metric, a column for each network (its name, its results)."""
    table = Table(title=title)
    table.add_column("")
    for name, _ in columns:
        table.add_column(name, justify="right")
    shown = [result for result in columns[0][1] if result.main]
    for row in shown:
        cells = [next((r for r in results if r.metric == row.metric), None) for _, results in columns]
        table.add_row(row.metric, *(_shown(cell) for cell in cells))
    return table


def _shown(result: Result | None) -> str:
    if result is None:
        return ""
    return f"{result.value:.1f} %" if result.unit == "%" else f"{result.value:.4g} {result.unit}".rstrip()
