"""Training speed: images per second, share of time waiting for data, FLOPs utilization, GPU memory."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from dino_lightning.data.batch import num_images
from dino_lightning.runtime.console import warn

DTYPES = {"16": torch.float16, "bf": torch.bfloat16, "64": torch.float64}
"""First two characters of `trainer.precision` -> dtype of its matrix products; float32 otherwise."""
GIB = 2**30


class Throughput(L.Callback):
    """Logs, over the steps since the last logged row:

    `speed/images_per_second`   images (not crops) over all devices; the time includes waiting for data, but neither
                                evaluation nor checkpoints
    `speed/data_wait_share`     share of that time (0 to 1) in which rank 0 waited for its next batch
    `speed/mfu`                 model FLOPs utilization: the model's FLOP/s over the devices' peak (0 to 1), if known
    `speed/gpu_memory_gib`      peak of the memory that PyTorch had allocated on the GPU of rank 0
    """

    def __init__(
        self,
        *,
        flops_per_image: Callable[[Any], float] | None = None,
        peak: Callable[[torch.device, str], float | None] | None = None,
    ) -> None:
        """`flops_per_image` counts a method's FLOPs before its weights are sharded; without it, MFU is not logged."""
        self.images, self.seconds = 0, 0.0
        self._row_images, self._row_seconds, self._row_waited = 0, 0.0, 0.0
        """Since the last logged row."""
        self._last, self._waited, self._step = 0.0, 0.0, 0
        self._flops_per_image, self._peak = flops_per_image, peak or peak_flops
        self._mfu_per_rate: float | None = None
        """MFU at one image per second."""

    @property
    def images_per_second(self) -> float:
        """Mean over the run so far; 0 before the first batch."""
        return self.images / self.seconds if self.seconds else 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Count the model's FLOPs if the device's peak is known."""
        if self._flops_per_image is None:
            return
        peak = self._peak(trainer.strategy.root_device, str(trainer.precision))
        if peak is None:
            return
        try:
            self._mfu_per_rate = self._flops_per_image(pl_module) / (peak * trainer.world_size)
        except Exception as error:  # a user's network may fail on the meta device
            warn(f"speed/mfu is not logged: the FLOPs of this network could not be counted ({error}).")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._last, self._step = time.perf_counter(), trainer.global_step
        self._waited = _waited(trainer) or 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count a micro-batch."""
        now = time.perf_counter()
        images, seconds = num_images(batch) * trainer.world_size, now - self._last
        self._last = now
        self.images, self.seconds = self.images + images, self.seconds + seconds
        self._row_images, self._row_seconds = self._row_images + images, self._row_seconds + seconds
        waited = _waited(trainer)
        if waited is not None:
            self._row_waited, self._waited = self._row_waited + waited - self._waited, waited
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if stepped and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log(pl_module, wait_known=waited is not None)

    def _log(self, method: Any, *, wait_known: bool) -> None:
        rate = self._row_images / self._row_seconds
        method.log_metric("speed/images_per_second", rate)
        if wait_known:
            method.log_metric("speed/data_wait_share", self._row_waited / self._row_seconds)
        if self._mfu_per_rate is not None:
            method.log_metric("speed/mfu", rate * self._mfu_per_rate)
        if method.device.type == "cuda":  # counted by the allocator, so this does not wait for the device
            method.log_metric("speed/gpu_memory_gib", torch.cuda.max_memory_allocated(method.device) / GIB)
            torch.cuda.reset_peak_memory_stats(method.device)
        self._row_images, self._row_seconds, self._row_waited = 0, 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """The totals, so that a resumed run reports the mean over the whole run."""
        return {"images": self.images, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the totals."""
        self.images, self.seconds = state_dict["images"], state_dict["seconds"]


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of the device at Lightning's `precision`; None if unknown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about unknown devices
        return get_available_flops(device, DTYPES.get(precision[:2], torch.float32)) or None


def _waited(trainer: L.Trainer) -> float | None:
    """Seconds spent waiting for batches so far; None if the loader does not count them."""
    return getattr(trainer.train_dataloader, "waited_s", None)
