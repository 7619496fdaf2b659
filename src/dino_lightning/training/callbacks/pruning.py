"""Pruning: a run of a sweep stops early if it is worse than the other runs were at the same epoch.

It only reads files in the sweep's folder, so it works with every launcher and sweeper, including grid sweeps.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import lightning as L

from dino_lightning.config import PruningConfig
from dino_lightning.loggers.csv import METRICS_FILE, read_rows
from dino_lightning.methods.base import Method
from dino_lightning.runtime.collectives import any_rank
from dino_lightning.runtime.files import FAILED
from dino_lightning.training.callbacks.knn import KNNCallback

KNN = "knn/top1"


class Pruning(L.Callback):
    """Applies Optuna's percentile pruner to each k-NN evaluation but the last; rank 0 decides for all ranks."""

    def __init__(self, config: PruningConfig, *, folder: Path, knn: KNNCallback) -> None:
        """`folder` belongs to this run; its siblings are the other runs of the sweep."""
        self.config = config
        self.folder = folder
        self.knn = knn
        self.verdict: str | None = None
        """Why the run stopped early, for `summary.json`; set on rank 0 only."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the result of the k-NN callback, which runs before this one."""
        warmup = cast(Method, pl_module).duration(self.config.warmup, key="callbacks.pruning.warmup")
        last = trainer.current_epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if trainer.should_stop or last or trainer.global_step <= warmup or self.knn.last_step != trainer.global_step:
            return
        if trainer.is_global_zero:
            self.verdict = self._verdict(trainer)
        if any_rank(self.verdict is not None):
            trainer.should_stop = True
        if self.verdict is not None:
            # Not through a rich console: only output to stderr appears above the progress bar.
            print(f"Pruned {self.verdict}. The run ends here (callbacks.pruning).", file=sys.stderr, flush=True)

    def _verdict(self, trainer: L.Trainer) -> str | None:
        epoch = trainer.current_epoch
        values = {**knn_by_epoch(self.folder), epoch: self.knn.last["top1"]}
        others = finished_siblings(self.folder)
        if not is_worse(values, others, self.config):
            return None
        compared = sum(epoch in other for other in others)
        return (
            f"after epoch {epoch + 1} of {trainer.max_epochs}: its best k-NN accuracy, {max(values.values()):.1f} %, "
            f"is not among the upper {self.config.keep_percent:g} % of {compared} finished runs at this epoch"
        )


def is_worse(values: dict[int, float], others: list[dict[int, float]], config: PruningConfig) -> bool:
    """Whether Optuna's percentile pruner stops a run with these values, by epoch, given those of finished runs."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.PercentilePruner(
        config.keep_percent, n_startup_trials=config.after_jobs, n_min_trials=config.after_jobs
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna 2 warns that trials from elsewhere are experimental
        study = optuna.create_study(direction="maximize", pruner=pruner)
        for other in others:
            study.add_trial(optuna.trial.create_trial(value=other[max(other)], intermediate_values=other))
        trial = study.ask()
        for epoch, value in values.items():
            trial.report(value, epoch)
        return trial.should_prune()


def finished_siblings(folder: Path) -> list[dict[int, float]]:
    """k-NN accuracy in percent by epoch, for each finished run in the sweep's other numbered folders."""
    siblings = [path for path in folder.absolute().parent.iterdir() if path.name.isdigit() and path.name != folder.name]
    histories = (knn_by_epoch(path) for path in sorted(siblings) if _finished(path))
    return [history for history in histories if history]


def knn_by_epoch(folder: Path) -> dict[int, float]:
    """k-NN top-1 accuracy in percent by epoch, counted from 0, from the rows of `metrics.csv`."""
    rows = [row for row in read_rows(folder / METRICS_FILE) if KNN in row and row.get("epoch", "").isdigit()]
    return {int(row["epoch"]): float(row[KNN]) for row in rows}


def _finished(folder: Path) -> bool:
    if (folder / FAILED).exists():
        return False
    try:
        summary: Any = json.loads((folder / "summary.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(summary, dict) and not summary.get("pruned")
