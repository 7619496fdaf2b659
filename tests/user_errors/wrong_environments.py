"""Rows: devices, folders, loggers, environment variables, system limits."""

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from wrong_files import photos, touch
from wrong_images import as_nobody
from wrong_inputs import Around, Wrong

from dino_lightning.runtime import environment as checks_environment
from dino_lightning.training import resources as checks_resources

Make = Callable[[Path], list[str]]
NUMBERS = "this environment variable is an index or a number of processes; expected an integer, or unset it."


def words(*given: str) -> Make:
    """Overrides in which `DIR` is the folder."""
    return lambda path: [word.replace("DIR", str(path)) for word in given]


def with_variables(**variables: str | None) -> Around:
    """Sets environment variables; None removes one."""

    @contextmanager
    def changed(path: Path) -> Iterator[None]:
        given = {name: value.replace("DIR", str(path)) for name, value in variables.items() if value is not None}
        with patch.dict(os.environ, given):
            for name in variables.keys() - given.keys():
                os.environ.pop(name, None)
            yield

    return changed


def without_package(*names: str) -> Around:
    """Pretends that packages are not installed."""
    return lambda _: patch.dict(sys.modules, dict.fromkeys(names))


@contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """`path/disk` is a disk with 1 MB."""
    with mounted(path / "disk", "1m"):
        yield


@contextmanager
def small_shared_memory(path: Path) -> Iterator[None]:
    """Shared memory has 1 MB, as in a container."""
    with mounted(path / "shm", "1m"), patch.object(checks_resources, "SHARED_MEMORY", path / "shm"):
        yield


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    """Mounts a file system in memory."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def few_open_files(_: Path) -> Iterator[None]:
    """`ulimit -n 300`, permanently."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
    yield


@contextmanager
def hidden_gpus(path: Path) -> Iterator[None]:
    """The driver lists two GPUs, but neither is visible."""
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (path / "gpus" / name).mkdir(parents=True)
    with patch.object(checks_environment, "GPUS", path / "gpus"), patch.dict(os.environ, CUDA_VISIBLE_DEVICES="7"):
        yield


@contextmanager
def port_in_use(path: Path) -> Iterator[None]:
    """Another program uses the port of the process group."""
    with socket.socket() as other:
        other.bind(("", 29517))
        other.listen()
        with with_variables(MASTER_PORT="29517", MASTER_ADDR="127.0.0.1")(path):
            yield


ROWS = [
    Wrong(
        "accelerator=gpu without a GPU",
        words("trainer.accelerator=gpu"),
        "trainer.accelerator=gpu: this machine has no GPU that PyTorch can use; set trainer.accelerator=cpu.",
        around=with_variables(CUDA_VISIBLE_DEVICES=None),
    ),
    Wrong(
        "accelerator=gpu with all GPUs hidden",
        words("trainer.accelerator=gpu"),
        "trainer.accelerator=gpu: this machine has no GPU that PyTorch can use, with CUDA_VISIBLE_DEVICES=-1; set "
        "trainer.accelerator=cpu.",
        around=with_variables(CUDA_VISIBLE_DEVICES="-1"),
    ),
    Wrong(
        "a GPU index in CUDA_VISIBLE_DEVICES that does not exist",
        words("trainer.accelerator=auto", "trainer.precision=32"),
        "CUDA_VISIBLE_DEVICES=7: this machine has 2 GPU(s), with indices from 0, and the variable selects "
        "none of them; correct it, or set trainer.accelerator=cpu.",
        around=hidden_gpus,
    ),
    Wrong(
        "accelerator=tpu without a TPU",
        words("trainer.accelerator=tpu"),
        "trainer.accelerator=tpu: this machine has no device of type 'tpu' that PyTorch can use; set "
        "trainer.accelerator=cpu.",
    ),
    Wrong(
        "zero processes on a CPU",
        words("trainer.devices=0"),
        "trainer.devices=0: expected auto or a number of processes of at least 1 on a CPU.",
    ),
    Wrong(
        "device indices on a CPU",
        words("trainer.devices=[0,1]"),
        "trainer.devices=[0,1]: expected auto or a number of processes of at least 1 on a CPU.",
    ),
    Wrong(
        "more processes than batches",
        words("trainer.devices=8"),
        "data.batch_size_per_device=4 on 8 device(s) is larger than the 16 training images; set it to at most 2.",
    ),
    Wrong(
        "several machines without a launcher",
        words("trainer.num_nodes=2"),
        "trainer.num_nodes=2: no process was started on the other machines, so this one would wait for them; "
        "start it with srun or torchrun, or set trainer.num_nodes=1.",
        around=with_variables(**dict.fromkeys(checks_environment.LAUNCHERS)),
    ),
    Wrong(
        "a port in use",
        words("trainer.devices=2"),
        "MASTER_PORT=29517: the processes of this run cannot use this port (Address already in use); set this "
        "environment variable to a free port.",
        around=port_in_use,
    ),
    Wrong(
        "an invalid port",
        words("trainer.devices=2"),
        "MASTER_PORT=http: expected a port from 1 to 65535, or unset this environment variable.",
        around=with_variables(MASTER_PORT="http"),
    ),
    Wrong(
        "a MASTER_ADDR that does not exist",
        words("trainer.devices=2"),
        "MASTER_ADDR=no-such-host.invalid: no machine has this name (…); set this environment variable to the "
        "name of the first machine.",
        around=with_variables(MASTER_ADDR="no-such-host.invalid", MASTER_PORT="29517"),
    ),
    Wrong("an invalid RANK", words(), f"RANK=first: {NUMBERS}", around=with_variables(RANK="first")),
    Wrong("an invalid WORLD_SIZE", words(), f"WORLD_SIZE=all: {NUMBERS}", around=with_variables(WORLD_SIZE="all")),
    Wrong(
        "output_dir is a file",
        lambda path: [f"output_dir={touch(path / 'o')}"],
        "output_dir=DIR/o cannot be written ('DIR/o' is a file or inside a file); choose a folder that you "
        "can write to.",
    ),
    Wrong(
        "output_dir is inside a file",
        lambda path: [f"output_dir={touch(path / 'o') / 'run'}"],
        "output_dir=DIR/o/run cannot be written ('DIR/o/run' is a file or inside a file); choose a folder that you "
        "can write to.",
    ),
    Wrong(
        "output_dir without write permission",
        words("output_dir=DIR/o"),
        "output_dir=DIR/o cannot be written (Permission denied); choose a folder that you can write to.",
        around=as_nobody,
        needs_root=True,
    ),
    Wrong(
        "output_dir where no folder can be created",
        words("output_dir=/proc/run"),
        "output_dir=/proc/run cannot be written (No such file or directory); choose a folder that you can write to.",
    ),
    Wrong(
        "an output_dir with a name of 300 letters",
        words(f"output_dir=DIR/{'x' * 300}"),
        f"output_dir=DIR/{'x' * 300} cannot be written (File name too long); choose a folder that you can write to.",
    ),
    Wrong(
        "too little disk space for a checkpoint",
        words("output_dir=DIR/disk/run"),
        "output_dir=DIR/disk/run: a checkpoint of this run needs about …, but only … are free; free disk space, or "
        "choose a folder on another disk.",
        around=small_disk,
        needs_root=True,
    ),
    Wrong(
        "too little shared memory for one batch per loader process",
        words("data.num_workers=4", "data.batch_size_per_device=16"),
        "data.num_workers=4: a batch needs …, each loader process keeps one in DIR/shm, but only 1 MB are free; "
        "increase the container's shared memory (docker run --shm-size=8g), or set data.num_workers to at most ….",
        around=small_shared_memory,
        needs_root=True,
    ),
    Wrong(
        "too low a limit of open files for the loader processes",
        words("data.num_workers=32"),
        "data.num_workers=32: this process may open 300 files, but its loader processes need about …; raise the limit "
        "(ulimit -n …), or set data.num_workers to at most ….",
        around=few_open_files,
        in_a_process=True,
    ),
    Wrong(
        "a cache that does not fit on its disk",
        lambda path: [
            "data=folder",
            f"data.path={photos(path / 'in', count=400)}",
            "data.cache=disk",
            f"data.cache_dir={path / 'disk'}",
        ],
        "data.cache=disk needs about 0.0 GB in DIR/disk/images, where 0.0 GB are free; choose a data.cache_dir "
        "with more space or a data.cache_resize below 256",
        around=small_disk,
        needs_root=True,
        while_training=True,
    ),
    Wrong(
        "an unknown key of the W&B logger",
        words("logger=wandb", "+logger.entitty=x"),
        "logger.entitty is not a key of the configuration; did you mean 'logger.entity'?",
    ),
    Wrong(
        "a misspelled key of the W&B logger",
        words("logger=wandb", "logger.projct=x"),
        "logger.projct is not a key of the configuration; did you mean 'logger.project'?",
    ),
    Wrong(
        "a project name that W&B does not accept",
        words("logger=wandb", "logger.project=a/b"),
        "logger.project=a/b: expected a name of 1 to 128 characters without / \\ # ? % and :.",
    ),
    Wrong(
        "an invalid WANDB_MODE",
        words("logger=wandb"),
        "WANDB_MODE=onlin: correct or unset this environment variable; did you mean 'online'?",
        around=with_variables(WANDB_MODE="onlin"),
    ),
    Wrong(
        "an invalid W&B timeout",
        words("logger=wandb", "logger.start_timeout_s=0"),
        "logger.start_timeout_s=0.0: expected a positive number.",
    ),
    Wrong(
        "logger=tensorboard without its package",
        words("logger=tensorboard"),
        "logger=tensorboard needs the package tensorboard; install it (pip install tensorboard), or choose logger=csv.",
        around=without_package("tensorboard", "tensorboardX"),
    ),
]
