"""Results on disk, one JSON line per figure, and on the screen, as a table."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from dino_lightning.evaluation.context import Result, Task
from dino_lightning.report.evaluations import format_figure


@dataclass
class ResultsFile:
    """`results.jsonl`, to which every evaluation appends its lines."""

    path: Path
    eval: str
    checkpoint: str
    """The value of `checkpoint=`."""
    config: dict[str, Any]
    """The complete configuration, JSON types only."""
    environment: dict[str, Any]
    """Commit, versions, machine."""

    def append(self, result: Result, task: Task, *, seconds: float) -> None:
        """Append one line; `seconds` since the start of the evaluation of this network."""
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
            "device": str(task.context.device),
            "world_size": task.context.fabric.world_size,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "environment": self.environment,
            "config": self.config,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            # A single write, so that the lines of concurrent evaluations do not mix.
            file.write((json.dumps(line) + "\n").encode())


def results_table(title: str, columns: Sequence[tuple[str, Sequence[Result]]]) -> Table:
    """The main results: a row per metric, a column per network, given as (name, results)."""
    table = Table(title=title)
    table.add_column("")
    for name, _ in columns:
        table.add_column(name, justify="right")
    for metric in (result.metric for result in columns[0][1] if result.main):
        cells = [next((each for each in results if each.metric == metric), None) for _, results in columns]
        table.add_row(metric, *(format_figure(each.value, each.unit) if each else "" for each in cells))
    return table
