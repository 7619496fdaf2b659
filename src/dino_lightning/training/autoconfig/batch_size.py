"""Batch-size finder: trains a few steps on random crops and halves the batch until it fits into the device's memory."""

import gc
import os
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from dino_lightning.config import TrainConfig
from dino_lightning.data.batch import LabeledCrops
from dino_lightning.errors import UserError
from dino_lightning.methods.base import GLOBAL_CROPS
from dino_lightning.runtime.console import quieten_libraries
from dino_lightning.runtime.ranks import is_first_on_machine
from dino_lightning.training.build import build_method

RESULT_VARIABLE = "DINO_LIGHTNING_BATCH"
"""Passes the first process's result to the processes that Lightning starts for the other devices."""
MEMORY_SHARE = 0.9
"""Share of the device's memory; the rest is for the k-NN evaluation and fragmentation."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""In PyTorch's messages of memory errors that are not an `OutOfMemoryError`."""


def largest_batch(config: TrainConfig) -> int:
    """The configured batch per device, or the half, quarter, ... of it that fits.

    Processes of another launcher could each get another result, so they keep the configured batch. Raises `UserError`
    if a single image does not fit.
    """
    batch = config.data.batch_size_per_device
    if not is_first_on_machine():
        return int(os.environ.get(RESULT_VARIABLE, batch))
    if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) == 1:
        while not fits_in_memory(config, batch=batch):
            if batch == 1:
                raise UserError(
                    f"crops.global_size={config.crops.global_size}: a step with a single image does not fit into the "
                    "memory of the device; choose smaller crops, a smaller backbone, or compute=checkpointed."
                )
            batch //= 2
    os.environ[RESULT_VARIABLE] = str(batch)
    return batch


def fits_in_memory(config: TrainConfig, *, batch: int) -> bool:
    """Whether steps with `batch` images succeed on one device."""
    devices = [int(index) for index in listed_devices(config.trainer.devices)[:1]]  # the others may be in use
    gpu, on_gpu = (devices or [0])[0], torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE, gpu)
    try:
        train_steps(config, devices or 1, batch=batch)
        return True
    except (MemoryError, RuntimeError) as error:  # includes `torch.OutOfMemoryError`
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        return False
    finally:
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0, gpu)


def listed_devices(devices: Any) -> list[str]:
    """The indices that `trainer.devices` lists, such as 3 and 1 for "3,1"; none if it is a number of devices."""
    text = str(devices).strip("[] ")
    return [index for index in text.split(",") if index.strip()] if isinstance(devices, list) or "," in text else []


def train_steps(config: TrainConfig, devices: list[int] | int, *, batch: int) -> None:
    """Train the configured method for two steps: the first allocates the optimizer's moments, the second needs them."""
    quieten_libraries()
    sizes = [config.crops.global_size] * GLOBAL_CROPS + [config.crops.local_size] * config.crops.local_count
    crops: Any = [torch.randn(batch, config.data.channels, size, size) for size in sizes]
    if config.method.uses_labels:
        crops = LabeledCrops(crops, torch.zeros(batch, dtype=torch.long))
    quiet: dict[str, Any] = {f"enable_{name}": False for name in ("checkpointing", "progress_bar", "model_summary")}
    machine = {"accelerator": config.trainer.accelerator, "devices": devices, "precision": config.trainer.precision}
    trainer = L.Trainer(**machine, **quiet, max_epochs=1, logger=False)
    trainer.fit(build_method(replace(config, init_from=None), num_classes=2), DataLoader([crops] * 2, batch_size=None))  # type: ignore[arg-type]
