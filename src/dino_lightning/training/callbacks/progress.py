"""The progress bar: one line for the whole run with loss, k-NN accuracy, images/s and remaining time."""

import time
from contextlib import suppress
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dino_lightning.methods.base import Method
from dino_lightning.training.callbacks.knn import KNNCallback
from dino_lightning.training.callbacks.throughput import Throughput

REFRESH_INTERVAL_S = 0.25


class RunProgress(ProgressBar):
    """A bar over the optimizer steps of the run; if the output is not a terminal, one line per epoch."""

    def __init__(self, throughput: Throughput) -> None:
        super().__init__()
        self.throughput = throughput
        self.console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._next_refresh = 0.0
        self._knn: KNNCallback | None = None
        self._enabled = True

    def disable(self) -> None:
        """Hide the bar (Lightning calls this on all ranks but 0)."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self._enabled = True

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Subscribe to the progress of k-NN evaluations."""
        super().setup(trainer, pl_module, stage)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, KNNCallback):
                self._knn = callback
                callback.on_progress = lambda done, total: self._show_evaluation(trainer, done, total)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar."""
        self._open(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the bar a few times per second."""
        if self._bar is not None and time.monotonic() >= self._next_refresh:
            self._next_refresh = time.monotonic() + REFRESH_INTERVAL_S
            self._update(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the metrics of the epoch."""
        if self._bar is not None:
            self._update(trainer)
        elif self._enabled:
            with suppress(OSError):  # the log may be on a full disk
                self.console.print(self._describe(trainer), highlight=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any, exception: BaseException | None = None) -> None:
        """Close the bar, also before an error, which then appears below it."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    on_exception = on_train_end

    def _open(self, trainer: L.Trainer) -> None:
        if self._bar is not None or not (self._enabled and self.console.is_terminal):
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),  # leaves room for the rest in 80 columns
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
        )
        total = int(trainer.estimated_stepping_batches)
        self._task = self._bar.add_task("starting", total=total, completed=trainer.global_step)
        self._bar.start()

    def _show_evaluation(self, trainer: L.Trainer, done: int, total: int) -> None:
        self._open(trainer)
        if self._bar is not None:
            self._bar.update(self._task, description=f"epoch {trainer.current_epoch + 1}  k-NN: {done}/{total} images")

    def _update(self, trainer: L.Trainer) -> None:
        assert self._bar is not None
        self._bar.update(self._task, description=self._describe(trainer), completed=trainer.global_step)

    def _describe(self, trainer: L.Trainer) -> str:
        """Only of values that are on the host: reading a metric of the trainer may wait for the device."""
        parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"]
        loss = cast(Method, trainer.lightning_module).metrics.latest
        if loss is not None:
            parts.append(f"loss {loss:.3f}")
        if self._knn is not None and self._knn.last:
            parts.append(f"k-NN {self._knn.last['top1']:.1f} %")
        if self.throughput.seconds:
            parts.append(f"{self.throughput.images_per_second:.0f} images/s")
        return "  ".join(parts)
