"""Images per second, waiting for data included, evaluation and checkpoints not."""

import time
from typing import Any

import lightning as L

from dino_lightning.data.labels import images_in


class Speed(L.Callback):
    """Counts images (not crops) over all devices and logs `speed/images_per_second` of the last logging window."""

    def __init__(self) -> None:
        self.images, self.seconds = 0, 0.0
        self._window_images, self._window_seconds = 0, 0.0
        self._last, self._step = 0.0, 0

    @property
    def images_per_second(self) -> float:
        """Mean over the run so far; 0 before the first batch."""
        return self.images / self.seconds if self.seconds else 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._last, self._step = time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count a micro-batch."""
        now = time.perf_counter()
        images, seconds = images_in(batch) * trainer.world_size, now - self._last
        self._last = now
        self.images, self.seconds = self.images + images, self.seconds + seconds
        self._window_images, self._window_seconds = self._window_images + images, self._window_seconds + seconds
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if stepped and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.note("speed/images_per_second", self._window_images / self._window_seconds)
            self._window_images, self._window_seconds = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Totals, so that a resumed run reports the whole."""
        return {"images": self.images, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the totals."""
        self.images, self.seconds = state_dict["images"], state_dict["seconds"]
