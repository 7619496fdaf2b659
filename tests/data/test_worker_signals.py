"""Loader processes ignore the signals that end a run; their main process ends them."""

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from dino_lightning.data.batches import WorkerLoader

WAIT = 30
"""Seconds for a process to end."""


class Numbers(Dataset[Any]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, os.getpid()


def loader() -> Any:
    return iter(WorkerLoader(Numbers(), batch_size=2, num_workers=1, prefetch_factor=2))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_a_loader_process_ignores_signals_of_others(name: str) -> None:
    batches = loader()
    first, pids = next(batches)
    # As a scheduler sends it: from a process that is not the parent.
    subprocess.run(["kill", f"-{name.removeprefix('SIG')}", str(int(pids[0]))], check=True)
    numbers = [first, *(numbers for numbers, _ in batches)]
    assert torch.cat(numbers).tolist() == list(range(40))


AT_FORK: list[Any] = []
"""Calls in a new process, before anything of ours; telemetry and some libraries of numbers start threads like that."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [call() for call in AT_FORK])


@pytest.mark.skipif(sys.platform != "linux", reason="asks who has sent a signal")
def test_threads_do_not_receive_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "AT_FORK", [threading.Thread(target=time.sleep, args=[WAIT], daemon=True).start])
    batches = loader()
    first, pids = next(batches)
    for _ in range(5):
        subprocess.run(["kill", "-TERM", str(int(pids[0]))], check=True)
    numbers = [first, *(numbers for numbers, _ in batches)]
    assert torch.cat(numbers).tolist() == list(range(40))
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, []), "here it arrives as before"


def test_the_main_process_ends_it() -> None:
    batches = loader()
    next(batches)
    (worker,) = batches._workers
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(WAIT)
    assert worker.exitcode == 0
