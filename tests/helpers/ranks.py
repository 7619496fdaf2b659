"""Call a function on every rank of a process group, each in its own process.

The processes come from a fork server that has imported the libraries already (`fork_server.py`), because imports would
take longer than most tests.
"""

import os
import pickle
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

TIMEOUT_S = 240.0


def on_ranks(function: Callable[..., None], *arguments: Any, ranks: int = 2, **variables: str) -> None:
    """Call `function(rank, *arguments)` on each rank, with one thread and the environment variables of torchrun.

    `variables` are added to the environment.

    Raises:
        ProcessRaisedException: A rank raised an error; the message has its traceback.
        TimeoutError: Some ranks did not end in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    call = (pickle.dumps((function, arguments)), shared | variables)
    context: Any = mp.start_processes(_start, call, nprocs=ranks, join=False, start_method="forkserver")
    until = time.monotonic() + TIMEOUT_S
    while not context.join(timeout=until - time.monotonic()):
        if time.monotonic() > until:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"ranks still run after {TIMEOUT_S:.0f} s: {context.pids()}")


def results_of_ranks(folder: Path, *, ranks: int = 2) -> list[Any]:
    """The results that each rank has saved as `rankN.pt`."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def _start(rank: int, call: bytes, variables: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
    function, arguments = pickle.loads(call)  # last, because some modules read the environment when they are imported
    function(rank, *arguments)
