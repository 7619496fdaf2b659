"""How many images of a step fit into the memory of the device: by doing it, with crops of noise."""

import gc
import hashlib
import os
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dino_lightning.config import CropsConfig, TrainConfig
from dino_lightning.data.batch import LabeledCrops
from dino_lightning.errors import UserError
from dino_lightning.methods.base import GLOBAL_CROPS
from dino_lightning.runtime.console import quieten_libraries
from dino_lightning.training.build import build_method

FITS = "DINO_LIGHTNING_BATCH"
"""Variable by which the processes of other devices learn what the first one has found, and for which training: a
process may do several, one after another."""
STEPS = 2
"""Steps of a trial: the first one makes the optimizer's moments, the second has them beside it."""
MEMORY_SHARE = 0.9
"""Of the device's memory; the rest is for the k-NN evaluation and for what fragments."""
WORDS = ("out of memory", "can't allocate memory", "not enough memory")
"""PyTorch's, in errors of memory that are not an `OutOfMemoryError`."""


def largest_batch(config: TrainConfig) -> int:
    """The batch per device that is configured, or the half, quarter, … of it that fits.

    Processes that Lightning starts take what the first has found; those of another launcher, where each might find
    something else, what is configured. Raises `UserError` where a single image does not fit.
    """
    wanted = config.data.batch_size_per_device
    training, _, found = os.environ.get(FITS, "").partition(":")
    if training == _digest(config):
        return int(found)
    if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1:
        return wanted
    batch = wanted
    while not fits_in_memory(config, batch=batch):
        if batch == 1:
            raise UserError(
                f"crops.global_size={config.crops.global_size}: a step of a single image does not fit into the memory "
                "of the device; take smaller crops, a smaller backbone, or compute=checkpointed."
            )
        batch //= 2
    os.environ[FITS] = f"{_digest(config)}:{batch}"
    return batch


def _digest(config: TrainConfig) -> str:
    """Of all that a trial depends on."""
    parts = (config.method, config.backbone, config.crops, config.optim, config.compute, config.trainer)
    sizes = (config.data.batch_size_per_device, config.data.channels)
    return hashlib.sha256(repr((*parts, *sizes)).encode()).hexdigest()[:16]


def fits_in_memory(config: TrainConfig, *, batch: int) -> bool:
    """Whether some steps with `batch` images go through on one device."""
    on_gpu = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    place = (named_device(config.trainer.devices) or [0])[0]
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE, place)
    try:
        take_steps(config, batch=batch)
        return True
    except (MemoryError, RuntimeError) as error:  # `torch.OutOfMemoryError` is one
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in WORDS):
            raise
        return False
    finally:
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0, place)


def named_device(devices: Any) -> list[int] | None:
    """The first of the devices that `trainer.devices` names by index, None where it says how many: on others somebody
    else may be at work."""
    names = str(devices).strip("[] ")
    return [int(names.split(",")[0])] if isinstance(devices, list) or "," in names else None


def take_steps(config: TrainConfig, *, batch: int) -> None:
    """Train the configured method for `STEPS` steps with the configured precision."""
    quieten_libraries()
    data = random_crops(config.crops, batch=batch, channels=config.data.channels)
    batches: list[Any] = [
        LabeledCrops(data, torch.zeros(batch, dtype=torch.long)) if config.method.uses_labels else data
    ] * STEPS
    trainer = L.Trainer(
        accelerator=config.trainer.accelerator,
        devices=named_device(config.trainer.devices) or 1,
        precision=config.trainer.precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    method = build_method(replace(config, init_from=None), num_classes=2)
    trainer.fit(method, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]


def random_crops(crops: CropsConfig, *, batch: int, channels: int) -> list[Tensor]:
    """V crops of noise, each (B, C, size, size)."""
    sizes = [crops.global_size] * GLOBAL_CROPS + [crops.local_size] * crops.local_count
    return [torch.randn(batch, channels, size, size) for size in sizes]
