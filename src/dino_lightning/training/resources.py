"""What a run takes of the machine: disk for its checkpoints, shared memory and open files for its loader processes.

All estimates stand on what is known once the network is built, before any step. What certainly cannot work is refused;
what may not last is said.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import cast

import torch
import torch.multiprocessing
from torch import nn

from dino_lightning.config import AdamWConfig, CropsConfig, DataConfig, SGDConfig, TrainConfig
from dino_lightning.errors import UserError
from dino_lightning.methods.base import GLOBAL_CROPS, Method

SHARED_MEMORY = Path("/dev/shm")
"""Where loader processes put their batches on Linux."""
OTHER_FILES = 128
"""Open files of a process besides those of its loader processes: libraries, logs, sockets, images."""
FILES_PER_WORKER = 8
"""Pipes and semaphores between a process and one of its loader processes."""
MEBI = 1 << 20
SPARE = 64 * MEBI
"""Room for logs, pictures and the report of a run."""


def check_resources(config: TrainConfig, method: Method, *, processes: int, first: bool) -> None:
    """Refuse what cannot work with `processes` training processes on this machine; the `first` one looks."""
    if not first:
        return
    if config.trainer.enable_checkpointing and not config.trainer.barebones:
        check_disk(config, checkpoint_bytes(config, method))
    if config.data.num_workers:
        check_shared_memory(config, processes=processes)
        check_open_files(config, processes=processes)


def checkpoint_bytes(config: TrainConfig, method: Method) -> int:
    """Size of a checkpoint: all weights and buffers, and the optimizer's one or two tensors for each trained weight."""
    network = cast(nn.Module, method)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    trained = sum(weight.numel() * weight.element_size() for weight in network.parameters() if weight.requires_grad)
    match config.optim:
        case AdamWConfig():
            moments = 2
        case SGDConfig(momentum=momentum) if not momentum:
            moments = 0
        case _:
            moments = 1
    return kept + moments * trained


def check_disk(config: TrainConfig, size: int) -> None:
    """Refuse a disk with no room for one checkpoint beside the one that it takes the place of; warn if not for all."""
    folder, checkpoint = Path(config.output_dir), config.callbacks.checkpoint
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    there = sum(file.stat().st_size for file in (folder / "checkpoints").glob("*.ckpt"))
    if free < size + SPARE // 16 and not (there and free + there >= 2 * size):
        raise UserError(
            f"output_dir={config.output_dir}: a checkpoint of this run takes about {_size(size)}, and {_size(free)} "
            "are free there; make room, or choose a folder on another disk."
        )
    every, epochs = checkpoint.every_n_epochs, config.trainer.max_epochs or 0
    # Each is written beside the one that it takes the place of.
    files = 1 + checkpoint.keep_last + config.callbacks.knn.enabled + (max(epochs, 0) // every if every else 0)
    if free + there < files * size + SPARE:
        print(
            f"WARNING: the checkpoints of this run take up to {_size(files * size)} ({files} of {_size(size)}) in "
            f"{config.output_dir}, where {_size(free)} are free: keep fewer by callbacks.checkpoint.every_n_epochs.",
            file=sys.stderr,
        )


def batch_bytes(data: DataConfig, crops: CropsConfig) -> int:
    """Bytes of a batch on its way from a loader process: float32 crops, or uint8 ones for `crops=device`."""
    sizes = [crops.global_size] * GLOBAL_CROPS + [crops.local_size] * crops.local_count
    each = 1 if crops.backend == "device" else 4
    return data.batch_size_per_device * data.channels * sum(size * size for size in sizes) * each


def check_shared_memory(config: TrainConfig, *, processes: int) -> None:
    """Refuse a shared memory that cannot hold a batch of each loader process: the system would kill them."""
    if not SHARED_MEMORY.is_dir():
        return
    data, batch = config.data, batch_bytes(config.data, config.crops)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < processes * data.num_workers * batch:
        fits = free // (processes * batch)
        raise UserError(
            f"data.num_workers={data.num_workers}: a batch takes {_size(batch)}, one of each loader process goes "
            f"through {SHARED_MEMORY}, and {_size(free)} are free there; give the container more (docker run "
            f"--shm-size=8g), or set data.num_workers to at most {fits}."
        )
    if free < processes * data.num_workers * data.prefetch_batches * batch:
        print(
            f"WARNING: data.num_workers={data.num_workers} with data.prefetch_batches={data.prefetch_batches} may fill "
            f"{SHARED_MEMORY}, where {_size(free)} are free.",
            file=sys.stderr,
        )


def check_open_files(config: TrainConfig, *, processes: int) -> None:
    """Raise this process's limit of open files to what its loader processes take; refuse where that cannot be."""
    if sys.platform == "win32":
        return
    import resource

    del processes  # the limit is one of each process
    data = config.data
    crops = GLOBAL_CROPS + config.crops.local_count + 1
    held = crops * data.prefetch_batches if torch.multiprocessing.get_sharing_strategy() == "file_descriptor" else 0
    needed = OTHER_FILES + data.num_workers * (FILES_PER_WORKER + held)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        fits = max(0, (hard - OTHER_FILES) // (FILES_PER_WORKER + held))
        raise UserError(
            f"data.num_workers={data.num_workers}: this process may open {hard} files, and its loader processes take "
            f"about {needed}; raise the limit (ulimit -n {needed}), or set data.num_workers to at most {fits}."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


LARGE_CROPS = 96
"""Pixels from which a step is long against what its loader does, so that no core is left to the loader."""


def threads_beside(config: TrainConfig, *, devices: int) -> int:
    """Threads for each training process on a CPU; `devices` counts those of other runs on this machine, too.

    With small crops each loader process has a core to itself: threads that share one with it wait for each other in
    every small operation, which costs more than a second thread gains.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = config.data.num_workers if config.crops.global_size < LARGE_CROPS else 0
    return max(1, cores // devices - workers)


def trains_in_tiles(config: TrainConfig, method: Method) -> bool:
    """Whether large batches take so little memory at once that freed memory can be kept."""
    return method.student.in_tiles and "mixed" not in str(config.trainer.precision)
