"""Call a function on every rank of a group, each in a process of its own.

The processes come from one that has imported what they all need: most of them would take longer for that than for what
they are there for.
"""

import multiprocessing
import os
import pickle
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(["lightning.pytorch", "timm", "dino_lightning.training.run"])

LIMIT = 240.0
"""Seconds for all ranks together."""


def on_ranks(function: Callable[..., None], *arguments: Any, ranks: int = 2, **variables: str) -> None:
    """`function(rank, *arguments)` on each, with one thread and the environment that torchrun gives, and `variables`.

    Raises:
        ProcessRaisedException: What a rank has raised, with its traceback.
        TimeoutError: Some have not come to an end.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    words = (pickle.dumps((function, arguments)), shared | variables)
    started: Any = mp.start_processes(_start, words, nprocs=ranks, join=False, start_method="forkserver")
    until = time.monotonic() + LIMIT
    while not started.join(timeout=until - time.monotonic()):
        if time.monotonic() > until:
            for process in started.processes:
                process.kill()
            raise TimeoutError(f"ranks still work after {LIMIT:.0f} s: {started.pids()}")


def found_by_ranks(folder: Path, *, ranks: int = 2) -> list[Any]:
    """What each has saved as `rankN.pt`."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def _start(rank: int, call: bytes, variables: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
    function, arguments = pickle.loads(call)  # not before: some modules read the environment when they are imported
    function(rank, *arguments)
