"""Complete runs of `train.py` on two processes, started by Lightning or torchrun, that a test can disturb."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
SMALL = [
    "experiment=quick",
    "backbone=vit_micro",
    "method.out_dim=256",
    "crops.local_count=2",
    "logger=csv",
    "data.num_workers=0",
    "data.batch_size_per_device=8",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "cpu_threads=1",
    "callbacks.pictures.enabled=false",
    "callbacks.knn.enabled=false",
]
BUILTIN = ["data.train_images=64", "data.val_images=16"]
"""Two epochs with four steps on two ranks."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ONE_HOST = ["--nnodes=1", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-id=test"]


@dataclass(frozen=True)
class Ended:
    """A finished command."""

    status: int
    """Negative for a signal."""
    said: str
    """Its output on stdout and stderr."""
    seconds: float


def train(*words: str, launcher: Sequence[str] = (), data: Sequence[str] = BUILTIN) -> list[str]:
    """The command; without torchrun, Lightning starts the second process."""
    return [*(launcher or [sys.executable]), str(PROJECT / "train.py"), *SMALL, *data, *words]


MARKS: dict[int, str] = {}
"""A mark in the environment of a command's processes, by the id of its first process."""


def start(command: Sequence[str], *, log: Path, **variables: str) -> subprocess.Popen[bytes]:
    """Start in a new session, with one thread per process and a mark that identifies all of them."""
    mark = f"LAUNCHED={uuid.uuid4()}"
    variables = {**variables, "LAUNCHED": mark.removeprefix("LAUNCHED=")}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env=environment(variables),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=log.parent,
        )
    MARKS[process.pid] = mark
    return process


def environment(variables: Mapping[str, str] = {}) -> dict[str, str]:
    """The environment of a command, without variables of other launchers."""
    of_launchers = r"SLURM_|SUBMITIT_|TORCHELASTIC_|MASTER_|DINO_L|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)$"
    known = {key: value for key, value in os.environ.items() if not re.match(of_launchers, key)}
    return {**known, "PYTHONPATH": str(PROJECT / "src"), "OMP_NUM_THREADS": "1", **variables}


def run(command: Sequence[str], *, log: Path, timeout: float = 120, **variables: str) -> Ended:
    """Start and wait; remaining processes are killed afterwards, and all processes after `timeout`."""
    begun = time.monotonic()
    process = start(command, log=log, **variables)
    try:
        status = process.wait(timeout=timeout)
    finally:
        seconds = time.monotonic() - begun
        end_all(process.pid)
    return Ended(status, log.read_text(errors="replace"), seconds)


def members(first: int) -> list[int]:
    """The remaining processes of a command, by its first one; torchrun starts its workers in new sessions."""
    mark, found = MARKS[first].encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                variables = (entry / "environ").read_bytes()
            except OSError:
                continue
            if mark in variables:  # a zombie has none
                found.append(int(entry.name))
    return found


def end_all(first: int) -> None:
    """Kill the remaining processes of a command."""
    for number in members(first):
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            continue
