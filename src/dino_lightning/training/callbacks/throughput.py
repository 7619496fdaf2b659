"""Images per second, waiting for data included, evaluation and checkpoints not; and what holds them back."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from dino_lightning.data.batch import images_in
from dino_lightning.runtime.console import warn

DTYPES = {"16": torch.float16, "bf": torch.bfloat16, "64": torch.float64}
"""First two characters of `trainer.precision` -> type of its matrix products; float32 otherwise."""
GIB = 2**30


class Throughput(L.Callback):
    """Counts images (not crops) and logs of each logging window, the steps since the last row:

    `speed/images_per_second`   over all devices
    `speed/data_wait_share`     share of that time (0 to 1) in which rank 0 waited for its next batch
    `speed/mfu`                 the model's operations per second over the devices' peak (0 to 1), where that is known
    `speed/gpu_memory_gib`      most memory that PyTorch had given out on the GPU of rank 0
    """

    def __init__(
        self,
        *,
        flops_per_image: Callable[[Any], float] | None = None,
        peak: Callable[[torch.device, str], float | None] | None = None,
    ) -> None:
        """`flops_per_image` counts for a method, before its weights are spread over devices; None leaves MFU out."""
        self.images, self.seconds = 0, 0.0
        self._window_images, self._window_seconds, self._window_waited = 0, 0.0, 0.0
        self._last, self._waited, self._step = 0.0, 0.0, 0
        self._count, self._peak = flops_per_image, peak or peak_flops
        self._utilisation: float | None = None
        """MFU at one image a second."""

    @property
    def images_per_second(self) -> float:
        """Mean over the run so far; 0 before the first batch."""
        return self.images / self.seconds if self.seconds else 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Count the model's operations, where the peak of the device is known."""
        if self._count is None:
            return
        peak = self._peak(trainer.strategy.root_device, str(trainer.precision))
        if peak is None:
            return
        try:
            self._utilisation = self._count(pl_module) / (peak * trainer.world_size)
        except Exception as error:  # of a network of one's own, on a device without memory
            warn(f"speed/mfu is left out: the operations of this network could not be counted ({error}).")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._last, self._step = time.perf_counter(), trainer.global_step
        self._waited = _waited(trainer) or 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count a micro-batch."""
        now = time.perf_counter()
        images, seconds = images_in(batch) * trainer.world_size, now - self._last
        self._last = now
        self.images, self.seconds = self.images + images, self.seconds + seconds
        self._window_images, self._window_seconds = self._window_images + images, self._window_seconds + seconds
        waited = _waited(trainer)
        if waited is not None:
            self._window_waited, self._waited = self._window_waited + waited - self._waited, waited
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if stepped and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._note(pl_module, waits_known=waited is not None)

    def _note(self, method: Any, *, waits_known: bool) -> None:
        rate = self._window_images / self._window_seconds
        method.log_metric("speed/images_per_second", rate)
        if waits_known:
            method.log_metric("speed/data_wait_share", self._window_waited / self._window_seconds)
        if self._utilisation is not None:
            method.log_metric("speed/mfu", rate * self._utilisation)
        if method.device.type == "cuda":  # the allocator's own books: the device is not asked
            method.log_metric("speed/gpu_memory_gib", torch.cuda.max_memory_allocated(method.device) / GIB)
            torch.cuda.reset_peak_memory_stats(method.device)
        self._window_images, self._window_seconds, self._window_waited = 0, 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Totals, so that a resumed run reports the whole."""
        return {"images": self.images, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the totals."""
        self.images, self.seconds = state_dict["images"], state_dict["seconds"]


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations per second of the device's matrix units at Lightning's `precision`; None where it is not known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says of each device that it does not know it
        return get_available_flops(device, DTYPES.get(precision[:2], torch.float32)) or None


def _waited(trainer: L.Trainer) -> float | None:
    """Seconds waited for batches so far; None where the loader does not count them."""
    return getattr(trainer.train_dataloader, "waited_s", None)
