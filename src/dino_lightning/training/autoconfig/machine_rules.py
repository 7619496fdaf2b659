"""Settings by machine and amount of images: a rule, with its reasons.

What `suggest` leaves to the user, because it costs time: length, batch, devices, loader processes, precision. The rule
knows neither files nor devices; `suggested` looks at both. On a CPU it takes an experiment's crops and network as they
are.
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
    Suggestion,
    Suggestions,
)

LARGE = 100_000
"""Images from which a run takes all devices, larger batches and a wider network."""
SMALL_BATCH, DEVICE_BATCH = 128, 256
"""Images of a step: on small data; for each device on large data, up to the paper's."""
EPOCHS, FEWEST_STEPS, MOST_EPOCHS = 200, 5000, 2000
"""Length on a GPU: as published runs on small data are long; steps that a run needs to learn; whatever these say."""
CPU_BATCH, CPU_IMAGES, CPU_EPOCHS = 64, 350_000, 400
"""On a CPU: images of a step, of a whole run (some minutes at 32 pixels), and most epochs."""
MOST_WORKERS = 16
CORES_FOR_A_WORKER = 4
"""On a CPU, where the others train."""
EVALUATIONS = 10
"""Of a run, by k-NN."""
SIDES_KEPT = 2
"""Side of a kept image, in those of a global crop."""
SMALLEST_KEPT = 96
"""Side of a kept image (pixels), whatever the crop."""
MEMORY_SHARE = 0.25
"""Of the free memory that kept images may fill."""


@dataclass(frozen=True)
class Machine:
    """What there is to train with."""

    on_cpu: bool
    devices: int
    """Accelerators."""
    cores: int
    memory: int
    """Free bytes of the memory file system."""
    half: str
    """Precision with half the bits that the accelerators compute in well, or 32."""


@dataclass(frozen=True)
class DatasetStats:
    """The training images, of which a sample was looked at."""

    images: int
    side: float
    """Median shorter side (pixels)."""
    labeled: bool = True
    """Whether a k-NN evaluation is possible."""
    turned: int = 0
    """Images of the sample whose EXIF tag asks for a rotation."""


def this_machine(accelerator: str, *, memory: int) -> Machine:
    """The machine of this process, for Lightning's `accelerator`."""
    on_cpu = trains_on_cpu(accelerator)
    devices = 1 if on_cpu else max(1, cuda.device_count())
    half = "32"
    if not on_cpu and cuda.is_available():
        half = "bf16-mixed" if cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    # Lightning counts what this process may use, and all but one of them.
    return Machine(on_cpu, devices, suggested_max_num_workers(1) + 1, memory, half)


def suggest_for_machine(
    machine: Machine,
    seen: DatasetStats,
    *,
    crop: int = PAPER_GLOBAL,
    devices: int | None = None,
    widen: bool = True,
    given: Mapping[str, Any] | None = None,
) -> list[Suggestion]:
    """The rule.

    `crop` is the side of the global crops (pixels). `given` holds what the user has set, by key; `devices` how many
    their `trainer.devices` are. With `widen` a ViT-Ti may grow to a ViT-S.
    """
    rows, large = Suggestions(given or {}), seen.images >= LARGE
    if machine.on_cpu:
        count = devices or 1
        rows.add("trainer.precision", "32", "CPUs compute in it")
        rows.add("data.batch_size_per_device", *_at_most(CPU_BATCH, seen.images // count, "small crops, short steps"))
        rows.add("trainer.max_epochs", *_cpu_epochs(seen.images))
    else:
        every = "all, for many images" if large else "few images need no more"
        chosen = rows.add("trainer.devices", machine.devices if large else 1, every)
        count = devices or chosen
        rows.add("trainer.precision", machine.half, "what this device computes in")
        total = min(DEVICE_BATCH * count, PAPER_BATCH) if large else SMALL_BATCH
        why = f"{total} a step" if large else f"{total} a step: larger ones learn less from small data"
        batch = rows.add("data.batch_size_per_device", *_at_most(total // count, seen.images // count, why))
        rows.add("trainer.max_epochs", *_epochs(seen.images, total_batch=batch * count))
        if widen and large:
            rows.add("backbone.width", 384, "a ViT-S, for many images")
            rows.add("backbone.heads", 6, "a ViT-S")
    _loading(rows, machine, seen, devices=count, crop=crop)
    _evaluation(rows, seen)
    return rows.rows


def _at_most(batch: int, images: int, why: str) -> tuple[int, str]:
    return (max(1, images), "all images") if images < batch else (batch, why)


def _cpu_epochs(images: int) -> tuple[int, str]:
    epochs = min(max(round(CPU_IMAGES / images), 1), CPU_EPOCHS)
    return epochs, f"{epochs * images:,} images in all, minutes at 32 px"


def _epochs(images: int, *, total_batch: int) -> tuple[int, str]:
    paper, needed = round(PAPER_STEPS * PAPER_BATCH / images), -(-FEWEST_STEPS * total_batch // images)
    if paper < EPOCHS:
        return max(1, paper), "as many images in all as the paper's 100 epochs"
    if needed <= EPOCHS:
        return EPOCHS, "as published runs on small data"
    return min(needed, MOST_EPOCHS), f"{min(needed, MOST_EPOCHS) * images // total_batch:,} steps, of few images"


def _loading(rows: Suggestions, machine: Machine, seen: DatasetStats, *, devices: int, crop: int) -> None:
    if machine.on_cpu:
        rows.add("data.num_workers", max(1, machine.cores // CORES_FOR_A_WORKER), "the other cores train")
    else:
        each = min(max(1, machine.cores // devices - 1), MOST_WORKERS)
        rows.add("data.num_workers", each, f"of {machine.cores} cores")
        rows.add("crops.backend", "device", "colors and blur on the GPU")
    if seen.turned:
        rows.add("data.apply_exif_rotation", True, "photographs upright, as their cameras say")
    kept = max(SMALLEST_KEPT, SIDES_KEPT * crop)
    takes = seen.images * 3 * kept * kept * 4 // 3  # of three by four
    if seen.side > 1.5 * kept and takes < MEMORY_SHARE * machine.memory:
        rows.add("data.cache", "ram", f"decoded once: {takes / 1e6:,.0f} MB of {machine.memory / 1e6:,.0f} free")
        rows.add("data.cache_resize", kept, f"{kept // crop} times a crop's side")


def _evaluation(rows: Suggestions, seen: DatasetStats) -> None:
    if not seen.labeled:
        rows.add("callbacks.knn.enabled", False, "no class folders; judge by the pictures")
        return
    epochs = next(row.value for row in rows.rows if row.key == "trainer.max_epochs")
    every = max(1, epochs // EVALUATIONS) if isinstance(epochs, int) else 1
    rows.add("callbacks.knn.every_n_epochs", every, "ten evaluations" if every > 1 else "every epoch")
