"""What a run needs from the machine: disk for its checkpoints, shared memory and open files for its loader processes.

The estimates need only the built network. A run that cannot fit raises an error; one that may run out later, a warning.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
import torch.multiprocessing

from dino_lightning.config import AdamWConfig, SGDConfig, TrainConfig
from dino_lightning.errors import UserError
from dino_lightning.methods.base import GLOBAL_CROPS, Method
from dino_lightning.runtime.console import warn

SHARED_MEMORY = Path("/dev/shm")
"""Where loader processes put their batches on Linux."""
OTHER_FILES = 128
"""Open files of a process apart from its loader processes: libraries, logs, sockets, images."""
FILES_PER_WORKER = 8
"""Pipes and semaphores between a process and one of its loader processes."""
MEBI = 1 << 20
SPARE_BYTES = 64 * MEBI
"""Disk space for logs, pictures and the report of a run."""
LARGE_CROPS_PX = 96
"""From this crop size on, a step takes so much longer than loading its images that loader processes need no core."""


def check_disk(config: TrainConfig, method: Method) -> None:
    """Refuse a disk without room for one more checkpoint; warn if not all checkpoints of the run fit."""
    folder, size = Path(config.output_dir), checkpoint_bytes(config, method)
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    existing = sum(file.stat().st_size for file in (folder / "checkpoints").glob("*.ckpt"))
    if free < size + SPARE_BYTES // 16 and not (existing and free + existing >= 2 * size):
        raise UserError(
            f"output_dir={config.output_dir}: a checkpoint of this run needs about {_size(size)}, but only "
            f"{_size(free)} are free; free disk space, or choose a folder on another disk."
        )
    checkpoint, epochs = config.callbacks.checkpoint, config.trainer.max_epochs or 0
    every = checkpoint.every_n_epochs
    # One more than is kept: a new checkpoint is written before it replaces the old one.
    files = 1 + checkpoint.keep_last + config.callbacks.knn.enabled + (max(epochs, 0) // every if every else 0)
    if free + existing < files * size + SPARE_BYTES:
        warn(
            f"the checkpoints of this run take up to {_size(files * size)} ({files} of {_size(size)}) in "
            f"{config.output_dir}, where {_size(free)} are free: keep fewer by callbacks.checkpoint.every_n_epochs."
        )


def checkpoint_bytes(config: TrainConfig, method: Method) -> int:
    """Size of a checkpoint: all weights and buffers, and one or two optimizer tensors per trained weight."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in method.state_dict().values())
    trained = sum(weight.numel() * weight.element_size() for weight in method.parameters() if weight.requires_grad)
    match config.optim:
        case AdamWConfig():
            moments = 2
        case SGDConfig(momentum=momentum) if not momentum:
            moments = 0
        case _:
            moments = 1
    return weights + moments * trained


def check_shared_memory(config: TrainConfig, *, processes: int) -> None:
    """Refuse a shared memory that cannot hold a batch of each loader process: the system would kill them."""
    if not SHARED_MEMORY.is_dir():
        return
    data, crops = config.data, config.crops
    sizes = [crops.global_size] * GLOBAL_CROPS + [crops.local_size] * crops.local_count
    value_bytes = 1 if crops.backend == "device" else 4  # uint8 or float32
    batch = data.batch_size_per_device * data.channels * sum(size * size for size in sizes) * value_bytes
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < processes * data.num_workers * batch:
        raise UserError(
            f"data.num_workers={data.num_workers}: a batch needs {_size(batch)}, each loader process keeps one in "
            f"{SHARED_MEMORY}, but only {_size(free)} are free; increase the container's shared memory (docker run "
            f"--shm-size=8g), or set data.num_workers to at most {free // (processes * batch)}."
        )
    if free < processes * data.num_workers * data.prefetch_batches * batch:
        warn(
            f"data.num_workers={data.num_workers} with data.prefetch_batches={data.prefetch_batches} may fill "
            f"{SHARED_MEMORY}, where {_size(free)} are free."
        )


def check_open_files(config: TrainConfig) -> None:
    """Raise this process's limit of open files to what its loader processes need; refuse if that is impossible."""
    if sys.platform == "win32":
        return
    import resource

    workers, crops = config.data.num_workers, GLOBAL_CROPS + config.crops.local_count + 1
    per_worker = FILES_PER_WORKER
    if torch.multiprocessing.get_sharing_strategy() == "file_descriptor":
        per_worker += crops * config.data.prefetch_batches
    needed = OTHER_FILES + workers * per_worker
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise UserError(
            f"data.num_workers={workers}: this process may open {hard} files, but its loader processes need about "
            f"{needed}; raise the limit (ulimit -n {needed}), or set data.num_workers to at most "
            f"{max(0, (hard - OTHER_FILES) // per_worker)}."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def cpu_threads(config: TrainConfig, *, processes: int) -> int:
    """Threads of each of the training processes that share the CPU of this machine.

    With small crops each loader process has a core to itself: threads that share one with it wait for each other in
    every small operation, which costs more than a second thread gains.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = config.data.num_workers if config.crops.global_size < LARGE_CROPS_PX else 0
    return max(1, cores // processes - workers)


def trains_in_tiles(config: TrainConfig, method: Method) -> bool:
    """Whether a step needs so little memory, whatever the batch, that the process can keep memory that was freed."""
    return method.student.in_tiles and "mixed" not in str(config.trainer.precision)


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
