"""When a run is saved: at ends of epochs, by the clock, and when it is told to end.

A checkpoint stands for the moment after a whole optimizer step. A run that goes on from it repeats, bit for bit, what
the one before it did afterwards.
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
from dino_lightning.training.callbacks.knn import KNNCallback
from dino_lightning.training.callbacks.preemption import Preempted, PreemptionHandler

BEST = "best_knn.ckpt"
RETRY_SECONDS = 60.0
"""Wait after a file that could not be written."""


class Checkpointing(Checkpoint):
    """Writes `last.ckpt`, and under further names those to keep. Lightning calls it after all other callbacks."""

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        folder: Path,
        io: SafeCheckpointIO,
        signals: PreemptionHandler,
        knn: KNNCallback | None = None,
    ) -> None:
        self.config, self.folder, self.io, self.signals, self.knn = config, folder, io, signals, knn
        self.best: float | None = None
        """The best k-NN accuracy so far, in percent."""
        self.epoch_row: dict[str, Any] = {}
        """The row of the latest end of an epoch, which Lightning logs after it was saved."""
        self._next_save = float("inf")
        self._step = -1

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"best": self.best, "epoch_row": self.epoch_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.best, self.epoch_row = state_dict["best"], state_dict["epoch_row"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and make up for what the run before was ended in."""
        self._step = trainer.global_step
        self._wait(self.config.every_n_minutes * 60)
        if self.epoch_row and self.epoch_row["step"] == trainer.global_step - 1:
            self._make_up(trainer)

    def _make_up(self, trainer: L.Trainer) -> None:
        """Log the row of the epoch that the run before saved and did not come to log, its k-NN included."""
        values = dict(self.epoch_row["values"])
        if self.knn is not None and self.knn.made_up:
            # In float32, as Lightning has them.
            values |= {f"knn/{name}": float(np.float32(value)) for name, value in self.knn.last.items()}
            if trainer.is_global_zero and self._is_best():
                self.io.copy(self.folder / LAST, BEST)
        if not trainer.is_global_zero or has_row(self.folder.parent / METRICS_FILE, step=self._step - 1, keys=values):
            return
        for logger in trainer.loggers:
            logger.log_metrics(values, step=self._step - 1)
            logger.save()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save where it was asked for and a step is complete."""
        readings = cast(Method, pl_module).metrics
        if trainer.is_global_zero and time.monotonic() >= self._next_save:
            readings.request_save = True  # with the next loss, so that all ranks save after the same step
        complete, self._step = trainer.global_step != self._step, trainer.global_step
        if not complete or self._epoch_ends(trainer):
            return  # at the end of an epoch `on_train_epoch_end` follows
        if readings.stop_requested:
            self._save(trainer, [])
            raise self._leave()
        if readings.save_requested:
            self._save(trainer, [])

    def _epoch_ends(self, trainer: L.Trainer) -> bool:
        return trainer.is_last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, and leave if that was asked for."""
        names, epochs, every = [], trainer.current_epoch + 1, self.config.every_n_epochs
        if self._is_best():
            names.append(BEST)
        if every and epochs % every == 0:
            names.append(f"epoch{trainer.current_epoch:04d}.ckpt")
        loops = trainer.fit_loop.epoch_loop
        # Lightning logs these when all callbacks are done.
        logged = trainer._logger_connector.metrics["log"]
        values = {name: float(value) for name, value in logged.items()} | {"epoch": trainer.current_epoch}
        self.epoch_row = {"step": loops._batches_that_stepped - 1, "values": values}
        self._save(trainer, names)
        # At the end of the run there is nothing to go on with.
        run_ends = trainer.should_stop or epochs == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if not run_ends and self.signals.asked_anywhere():
            raise self._leave()

    def _is_best(self) -> bool:
        """Whether the k-NN accuracy of just now is better than all before; takes note of it."""
        if self.knn is None or self.knn.last_step != self._step or "top1" not in self.knn.last:
            return False
        if self.best is not None and self.knn.last["top1"] <= self.best:
            return False
        self.best = self.knn.last["top1"]
        return True

    def _save(self, trainer: L.Trainer, names: list[str]) -> None:
        method = cast(Method, trainer.lightning_module)
        # Lightning asks callbacks for their states before it asks the method, which would collect too late for them.
        method.flush_metrics()
        method.metrics.request_save = method.metrics.save_requested = False
        self.io.names = names
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        period = self.config.every_n_minutes * 60
        self._wait(min(period, RETRY_SECONDS) if self.io.failure else period)

    def _wait(self, seconds: float) -> None:
        self._next_save = time.monotonic() + seconds if seconds else float("inf")

    def _leave(self) -> Preempted:
        if isinstance(self.io, AsyncCheckpointIO):
            self.io.wait()
        leave = self.signals.leaving()
        if self.io.failure is not None:
            leave.status = 1
        return leave
