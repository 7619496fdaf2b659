"""Checks of the machine and its environment variables before images are opened."""

import ipaddress
import os
import socket
from pathlib import Path
from typing import Any

import torch

from dino_lightning.errors import UserError
from dino_lightning.runtime.devices import trains_on_cpu
from dino_lightning.runtime.ranks import RANKS, is_first_process

INTEGERS = (*RANKS, "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_LOCALID", "SLURM_NTASKS")
"""Environment variables of launchers that are indices or numbers of processes."""
SCHEDULERS = ("SLURM_NTASKS", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE", "KUBERNETES_PORT", "SUBMITIT_EXECUTOR")
LAUNCHERS = (*SCHEDULERS, "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK")
"""Environment variables of which at least one is set if a launcher starts processes on several machines."""
GPUS = Path("/proc/driver/nvidia/gpus")
"""Folder in which NVIDIA's driver lists all devices, also those that an environment variable hides."""


def check_variables() -> None:
    """Refuse invalid environment variables of launchers."""
    for name in INTEGERS:
        value = os.environ.get(name, "")
        if value and not value.isdecimal():
            raise UserError(
                f"{name}={value}: this environment variable is an index or a number of processes; "
                "expected an integer, or unset it."
            )
    port = os.environ.get("MASTER_PORT", "")
    if port and not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT={port}: expected a port from 1 to 65535, or unset this environment variable.")


def check_gpus(accelerator: str) -> None:
    """Refuse to train on a CPU by mistake where the machine has GPUs that PyTorch does not see."""
    if accelerator != "auto" or not trains_on_cpu(accelerator) or not GPUS.is_dir():
        return
    count, visible = len(list(GPUS.iterdir())), os.environ.get("CUDA_VISIBLE_DEVICES")
    if not count or (visible is not None and not visible.strip(" ,").replace("-1", "")):
        return  # no GPU, or all hidden on purpose
    if visible is not None:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible}: this machine has {count} GPU(s), with indices from 0, and the "
            "variable selects none of them; correct it, or set trainer.accelerator=cpu."
        )
    kind = "was built without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda} cannot use them"
    raise UserError(
        f"trainer.accelerator=auto: this machine has {count} GPU(s), but this PyTorch {torch.__version__} "
        f"{kind}; repair the installation, or set trainer.accelerator=cpu."
    )


def check_port(strategy: Any, *, world_size: int) -> None:
    """Refuse a port of the process group that another program uses. The first process checks before the others start.

    torchrun uses the port itself, and so do the processes in the second run of a sweep; it is not checked then.
    """
    environment = getattr(strategy, "cluster_environment", None)  # only strategies with several processes have one
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
            f"MASTER_PORT={port}: the processes of this run cannot use this port ({error.strerror}); "
            "set this environment variable to a free port."
        ) from error


def _is_here(environment: Any) -> bool:
    """Whether the main address is one of this machine. Raises `UserError` if no machine has that name."""
    name = environment.main_address
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(name, None)}
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={name}: no machine has this name ({error.strerror}); set this "
            "environment variable to the name of the first machine."
        ) from error
    own = {socket.gethostname(), socket.getfqdn(), "localhost"}
    return name in own or any(ipaddress.ip_address(str(address)).is_loopback for address in addresses)
