"""The rule of `auto.machine`: settings from the machine and the number of images, each with its reason.

It chooses what costs time, which `auto.data` leaves to the user: length, batch, devices, loader processes, precision.
On a CPU it keeps an experiment's crops and network. `apply` measures images and machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.data import suggested_max_num_workers
from torch import cuda

from dino_lightning.runtime.devices import trains_on_cpu
from dino_lightning.training.autoconfig.data_rules import (
    PAPER_BATCH,
    PAPER_GLOBAL,
    PAPER_STEPS,
    DatasetStats,
    Suggestion,
    Suggestions,
)

LARGE_DATASET = 100_000
"""Images from which on a run uses all devices, larger batches and a wider network."""
SMALL_DATA_BATCH, LARGE_DATA_BATCH_PER_DEVICE = 128, 256
"""Images of a step on small data; images per device on large data, up to the paper's total batch."""
USUAL_EPOCHS, MIN_STEPS, MAX_EPOCHS = 200, 5000, 2000
"""Length on a GPU: epochs of published runs on small data; steps that a run needs to learn; the limit of both."""
CPU_BATCH, CPU_IMAGES, CPU_MAX_EPOCHS = 64, 350_000, 400
"""On a CPU: images of a step; images of a whole run (some minutes at 32 pixels); most epochs."""
MAX_WORKERS = 16
CORES_PER_WORKER = 4
"""On a CPU, where the other cores train."""
EVALUATIONS = 10
"""k-NN evaluations of a run."""
CACHED_SIDE_CROPS, MIN_CACHED_SIDE_PX = 2, 96
"""Side of an image in the cache: so many global crops, but at least so many pixels."""
CACHE_MEMORY_SHARE = 0.25
"""Share of the free memory that cached images may fill."""


@dataclass(frozen=True)
class Machine:
    """The hardware that a run trains on."""

    on_cpu: bool
    devices: int
    """Accelerators."""
    cores: int
    memory: int
    """Free bytes of the memory file system."""
    precision: str
    """16-bit precision that the accelerators support, or 32."""


def this_machine(accelerator: str, *, memory: int) -> Machine:
    """The machine of this process, for Lightning's `accelerator`."""
    on_cpu = trains_on_cpu(accelerator)
    devices = 1 if on_cpu else max(1, cuda.device_count())
    precision = "32"
    if not on_cpu and cuda.is_available():
        precision = "bf16-mixed" if cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    # Lightning counts the cores that this process may use, minus one.
    return Machine(on_cpu, devices, suggested_max_num_workers(1) + 1, memory, precision)


def suggest_from_machine(
    machine: Machine,
    stats: DatasetStats,
    *,
    crop: int = PAPER_GLOBAL,
    devices: int | None = None,
    widen: bool = True,
    user_values: Mapping[str, Any] | None = None,
) -> list[Suggestion]:
    """Apply the rule.

    `crop` is the side of the global crops (pixels). `user_values`, by key, are kept; `devices` is the number of devices
    that they select. With `widen` a ViT-Ti may become a ViT-S.
    """
    suggestions, large = Suggestions(user_values or {}), stats.images >= LARGE_DATASET
    if machine.on_cpu:
        count = devices or 1
        suggestions.add("trainer.precision", "32", "CPUs compute in it")
        batch = _at_most(CPU_BATCH, stats.images // count, "small crops, short steps")
        suggestions.add("data.batch_size_per_device", *batch)
        epochs = min(max(round(CPU_IMAGES / stats.images), 1), CPU_MAX_EPOCHS)
        why = f"{epochs * stats.images:,} images in all, minutes at 32 px"
        suggestions.add("trainer.max_epochs", epochs, why)
    else:
        why = "all, for many images" if large else "few images need no more"
        chosen = suggestions.add("trainer.devices", machine.devices if large else 1, why)
        count = devices or chosen
        suggestions.add("trainer.precision", machine.precision, "what this device computes in")
        total = min(LARGE_DATA_BATCH_PER_DEVICE * count, PAPER_BATCH) if large else SMALL_DATA_BATCH
        why = f"{total} a step" if large else f"{total} a step: larger ones learn less from small data"
        batch = suggestions.add("data.batch_size_per_device", *_at_most(total // count, stats.images // count, why))
        suggestions.add("trainer.max_epochs", *_epochs(stats.images, total_batch=batch * count))
        if widen and large:
            suggestions.add("backbone.width", 384, "a ViT-S, for many images")
            suggestions.add("backbone.heads", 6, "a ViT-S")
    _loading(suggestions, machine, stats, devices=count, crop=crop)
    _evaluation(suggestions, stats)
    return suggestions.items


def _at_most(batch: int, images: int, why: str) -> tuple[int, str]:
    return (max(1, images), "all images") if images < batch else (batch, why)


def _epochs(images: int, *, total_batch: int) -> tuple[int, str]:
    paper, needed = round(PAPER_STEPS * PAPER_BATCH / images), -(-MIN_STEPS * total_batch // images)
    if paper < USUAL_EPOCHS:
        return max(1, paper), "as many images in all as the paper's 100 epochs"
    if needed <= USUAL_EPOCHS:
        return USUAL_EPOCHS, "as published runs on small data"
    return min(needed, MAX_EPOCHS), f"{min(needed, MAX_EPOCHS) * images // total_batch:,} steps, of few images"


def _loading(suggestions: Suggestions, machine: Machine, stats: DatasetStats, *, devices: int, crop: int) -> None:
    if machine.on_cpu:
        suggestions.add("data.num_workers", max(1, machine.cores // CORES_PER_WORKER), "the other cores train")
    else:
        workers = min(max(1, machine.cores // devices - 1), MAX_WORKERS)
        suggestions.add("data.num_workers", workers, f"of {machine.cores} cores")
        suggestions.add("crops.backend", "device", "colors and blur on the GPU")
    if stats.rotated:
        suggestions.add("data.apply_exif_rotation", True, "photographs upright, as their cameras say")
    side = max(MIN_CACHED_SIDE_PX, CACHED_SIDE_CROPS * crop)
    size = stats.images * 3 * side * side * 4 // 3  # RGB images with an aspect ratio of 4:3
    if stats.side > 1.5 * side and size < CACHE_MEMORY_SHARE * machine.memory:
        suggestions.add("data.cache", "ram", f"decoded once: {size / 1e6:,.0f} MB of {machine.memory / 1e6:,.0f} free")
        suggestions.add("data.cache_resize", side, f"{side // crop} times a crop's side")


def _evaluation(suggestions: Suggestions, stats: DatasetStats) -> None:
    if not stats.labeled:
        suggestions.add("callbacks.knn.enabled", False, "no class folders; judge by the pictures")
        return
    epochs = next(item.value for item in suggestions.items if item.key == "trainer.max_epochs")
    every = max(1, epochs // EVALUATIONS) if isinstance(epochs, int) else 1
    suggestions.add("callbacks.knn.every_n_epochs", every, "ten evaluations" if every > 1 else "every epoch")
