"""Batch-size finder: trains a few steps on random crops and halves the batch until it fits into the device's memory."""

import gc
import hashlib
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
from dino_lightning.training.build import build_method

RESULT_VARIABLE = "DINO_LIGHTNING_BATCH"
"""Passes the first process's result, with a digest of its configuration, to the processes of the other devices."""
MEMORY_SHARE = 0.9
"""Share of the device's memory; the rest is for the k-NN evaluation and fragmentation."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""In PyTorch's messages of memory errors that are not an `OutOfMemoryError`."""


def largest_batch(config: TrainConfig) -> int:
    """The configured batch per device, or the half, quarter, ... of it that fits.

    Processes that Lightning starts take over the first one's result. Those of another launcher could each get another
    result, so they keep the configured batch. Raises `UserError` if a single image does not fit.
    """
    batch = config.data.batch_size_per_device
    digest = hashlib.sha256(repr(config).encode()).hexdigest()[:16]
    known_digest, _, known_batch = os.environ.get(RESULT_VARIABLE, "").partition(":")
    if known_digest == digest:
        return int(known_batch)
    if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1:
        return batch
    while not fits_in_memory(config, batch=batch):
        if batch == 1:
            raise UserError(
                f"crops.global_size={config.crops.global_size}: a step with a single image does not fit into the "
                "memory of the device; choose smaller crops, a smaller backbone, or compute=checkpointed."
            )
        batch //= 2
    os.environ[RESULT_VARIABLE] = f"{digest}:{batch}"
    return batch


def fits_in_memory(config: TrainConfig, *, batch: int) -> bool:
    """Whether steps with `batch` images succeed on one device."""
    device = (device_index(config.trainer.devices) or [0])[0]
    on_gpu = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE, device)
    try:
        train_steps(config, batch=batch)
        return True
    except (MemoryError, RuntimeError) as error:  # includes `torch.OutOfMemoryError`
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        return False
    finally:
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def device_index(devices: Any) -> list[int] | None:
    """The first GPU of a list in `trainer.devices`, as the other GPUs may be in use; None for a number of devices."""
    indices = str(devices).strip("[] ")
    return [int(indices.split(",")[0])] if isinstance(devices, list) or "," in indices else None


def train_steps(config: TrainConfig, *, batch: int) -> None:
    """Train the configured method for two steps: the first allocates the optimizer's moments, the second needs them."""
    quieten_libraries()
    sizes = [config.crops.global_size] * GLOBAL_CROPS + [config.crops.local_size] * config.crops.local_count
    crops: Any = [torch.randn(batch, config.data.channels, size, size) for size in sizes]
    if config.method.uses_labels:
        crops = LabeledCrops(crops, torch.zeros(batch, dtype=torch.long))
    trainer = L.Trainer(
        accelerator=config.trainer.accelerator,
        devices=device_index(config.trainer.devices) or 1,
        precision=config.trainer.precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    method = build_method(replace(config, init_from=None), num_classes=2)
    trainer.fit(method, DataLoader([crops] * 2, batch_size=None))  # type: ignore[arg-type]
