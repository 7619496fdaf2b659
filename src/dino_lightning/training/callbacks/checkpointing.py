"""Saves the run at the end of epochs, every few minutes, and when the run is preempted.

A checkpoint is always taken after a complete optimizer step. On a CPU, a run resumed from it is bit-identical to one
that was never interrupted.
"""

import time
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Checkpoint

from dino_lightning.checkpoints.run_checkpoint import LAST, AsyncCheckpointIO, SafeCheckpointIO
from dino_lightning.config import CheckpointConfig
from dino_lightning.loggers.csv import METRICS_FILE, has_row
from dino_lightning.methods.base import Method
from dino_lightning.runtime.lightning_internals import epoch_metrics
from dino_lightning.training.callbacks.knn import KNNCallback
from dino_lightning.training.callbacks.preemption import Preempted, PreemptionHandler

BEST = "best_knn.ckpt"
RETRY_S = 60.0
"""Time until the next attempt after a file could not be written."""


class Checkpointing(Checkpoint):
    """Writes `last.ckpt`, and keeps some under further names. Lightning calls it after all other callbacks."""

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        folder: Path,
        io: SafeCheckpointIO,
        preemption: PreemptionHandler,
        knn: KNNCallback | None = None,
    ) -> None:
        self.config, self.folder, self.io, self.preemption, self.knn = config, folder, io, preemption, knn
        self.best: float | None = None
        """The best k-NN accuracy so far, in percent."""
        self.epoch_row: dict[str, Any] = {}
        """The metrics of the latest epoch's end, which Lightning logs only after the checkpoint was saved."""
        self._next_save = float("inf")
        self._step = -1

    def state_dict(self) -> dict[str, Any]:
        """Plain types only, so that `torch.load` reads the checkpoint with `weights_only=True`."""
        return {"best": self.best, "epoch_row": self.epoch_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best accuracy and the latest epoch's row."""
        self.best, self.epoch_row = state_dict["best"], state_dict["epoch_row"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and log the row of an epoch that the resumed run has saved but not logged."""
        self._step = trainer.global_step
        self._schedule_save(self.config.every_n_minutes * 60)
        if self.epoch_row and self.epoch_row["step"] == trainer.global_step - 1:
            self._log_epoch_row(trainer)

    def _log_epoch_row(self, trainer: L.Trainer) -> None:
        values = dict(self.epoch_row["values"])
        if self.knn is not None and self.knn.completed_on_resume:
            # Rounded to float32, as Lightning logs them.
            values |= {f"knn/{name}": float(np.float32(value)) for name, value in self.knn.last.items()}
            if trainer.is_global_zero and self._update_best():
                self.io.copy(self.folder / LAST, BEST)
        if not trainer.is_global_zero or has_row(self.folder.parent / METRICS_FILE, step=self._step - 1, keys=values):
            return
        for logger in trainer.loggers:
            logger.log_metrics(values, step=self._step - 1)
            logger.save()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save after a complete step if a save or a stop was requested."""
        metrics = cast(Method, pl_module).metrics
        if trainer.is_global_zero and time.monotonic() >= self._next_save:
            metrics.request_save = True  # travels with the next loss, so that all ranks save after the same step
        complete, self._step = trainer.global_step != self._step, trainer.global_step
        epoch_ends = trainer.is_last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps
        if not complete or epoch_ends:
            return  # at the end of an epoch `on_train_epoch_end` follows
        if metrics.stop_requested or metrics.save_requested:
            self._save(trainer, [])
        if metrics.stop_requested:
            raise self._preempted()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, and end the run if a stop was requested."""
        names, epochs, every = [], trainer.current_epoch + 1, self.config.every_n_epochs
        if self._update_best():
            names.append(BEST)
        if every and epochs % every == 0:
            names.append(f"epoch{trainer.current_epoch:04d}.ckpt")
        step, metrics = epoch_metrics(trainer)
        self.epoch_row = {"step": step, "values": metrics | {"epoch": trainer.current_epoch}}
        self._save(trainer, names)
        run_ends = trainer.should_stop or epochs == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if not run_ends and self.preemption.stop_requested_anywhere():
            raise self._preempted()

    def _update_best(self) -> bool:
        """Whether the k-NN accuracy of this step is better than all before; it is the best then."""
        if self.knn is None or self.knn.last_step != self._step or "top1" not in self.knn.last:
            return False
        if self.best is not None and self.knn.last["top1"] <= self.best:
            return False
        self.best = self.knn.last["top1"]
        return True

    def _save(self, trainer: L.Trainer, names: list[str]) -> None:
        method = cast(Method, trainer.lightning_module)
        # Lightning collects the states of callbacks before it calls the method, whose own flush is too late for them.
        method.flush_metrics()
        method.metrics.request_save = method.metrics.save_requested = False
        self.io.names = names
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        period = self.config.every_n_minutes * 60
        self._schedule_save(min(period, RETRY_S) if self.io.failure else period)

    def _schedule_save(self, seconds: float) -> None:
        self._next_save = time.monotonic() + seconds if seconds else float("inf")

    def _preempted(self) -> Preempted:
        if isinstance(self.io, AsyncCheckpointIO):
            self.io.wait()
        preempted = self.preemption.preempted()
        if self.io.failure is not None:
            preempted.status = 1
        return preempted
