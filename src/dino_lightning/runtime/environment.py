"""What the machine, its environment variables and its packages must offer, checked before images are opened."""

import ipaddress
import os
import re
import socket
from pathlib import Path
from typing import Any

import torch

from dino_lightning.errors import UserError
from dino_lightning.runtime.devices import trains_on_cpu
from dino_lightning.runtime.ranks import is_first_process

WHOLE_NUMBERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NTASKS",
)
"""Environment variables of launchers, from 0."""
LAUNCHERS = (
    "MASTER_ADDR",
    "SLURM_NTASKS",
    "TORCHELASTIC_RUN_ID",
    "LSB_JOBID",
    "OMPI_COMM_WORLD_SIZE",
    "KUBERNETES_PORT",
    "SUBMITIT_EXECUTOR",
    "WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
)
"""Environment variables of which one is there where something starts processes on several machines."""
GPU_NAME = re.compile(r"-?\d+|(GPU|MIG)-[0-9a-zA-Z/-]+|NoDevFiles")
"""The last is SLURM's word in jobs that have asked for no GPU."""
GPUS = Path("/proc/driver/nvidia/gpus")
"""NVIDIA's driver lists its devices here, whatever the environment hides."""


def check_variables() -> None:
    """Environment variables of launchers and libraries that hold something else than they should."""
    for name in WHOLE_NUMBERS:
        value = os.environ.get(name, "")
        if value and not value.isdecimal():
            raise UserError(
                f"{name}={value}: this environment variable numbers or counts the processes of a run; "
                "expected a whole number, or unset it."
            )
    port = os.environ.get("MASTER_PORT", "")
    if port and not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(
            f"MASTER_PORT={port}: expected the number of a port from 1 to 65535, or unset this environment variable."
        )
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads and not all(part.strip().isdecimal() and int(part) > 0 for part in threads.split(",")):
        raise UserError(
            f"OMP_NUM_THREADS={threads}: expected a number of threads of at least 1; unset this "
            "environment variable, or set cpu_threads."
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not all(GPU_NAME.fullmatch(part.strip()) for part in visible.split(",") if part.strip()):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible} hides every GPU: expected their numbers, such as 0,1, or "
            "unset this environment variable."
        )


def check_gpus(accelerator: str) -> None:
    """Refuse to train on a CPU by mistake where the machine has GPUs that PyTorch does not see."""
    if accelerator != "auto" or not trains_on_cpu(accelerator) or not GPUS.is_dir():
        return
    count, visible = len(list(GPUS.iterdir())), os.environ.get("CUDA_VISIBLE_DEVICES")
    if not count or (visible is not None and not visible.strip(" ,").replace("-1", "")):
        return  # none is there, or hidden on purpose
    if visible is not None:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible}: this machine has {count} GPU(s), numbered from 0, and none "
            "of them is named; correct it, or set trainer.accelerator=cpu."
        )
    kind = "was built without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda} cannot use them"
    raise UserError(
        f"trainer.accelerator=auto: this machine has {count} GPU(s), but this PyTorch {torch.__version__} "
        f"{kind}; mend the installation, or set trainer.accelerator=cpu."
    )


def check_port(strategy: Any, *, world_size: int) -> None:
    """Refuse a port for the processes to meet at that another program has; the first process looks, before all start.

    With torchrun the port is its own, and taken rightly; so it is in the second run of a sweep, where they have met.
    """
    environment = getattr(strategy, "cluster_environment", None)  # of Lightning's strategies, those with processes
    own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    met = torch.distributed.is_available() and torch.distributed.is_initialized()
    if environment is None or world_size == 1 or own or met or not is_first_process() or not _is_here(environment):
        return
    port = environment.main_port
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        raise UserError(
            f"MASTER_PORT={port}: the processes of this run cannot meet at this port ({error.strerror}); "
            "set this environment variable to a free one."
        ) from error


def _is_here(environment: Any) -> bool:
    """Whether the address to meet at is one of this machine. Raises `UserError` where no machine has that name."""
    name = environment.main_address
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(name, None)}
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={name}: there is no machine of this name ({error.strerror}); set this "
            "environment variable to the name of the first one."
        ) from error
    own = {socket.gethostname(), socket.getfqdn(), "localhost"}
    return name in own or any(ipaddress.ip_address(str(address)).is_loopback for address in addresses)
