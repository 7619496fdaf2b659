"""Loader processes outlive the signals that tell a run to end; their main process ends them."""

import os
import signal
import subprocess
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from dino_lightning.data.batches import start_worker

WAIT = 30
"""Seconds for a process to end."""


class Numbers(Dataset[Any]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, os.getpid()


def loader() -> Any:
    return iter(DataLoader(Numbers(), batch_size=2, num_workers=1, prefetch_factor=2, worker_init_fn=start_worker))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_a_signal_from_elsewhere_is_left_to_the_main_process(name: str) -> None:
    batches = loader()
    first, pids = next(batches)
    # As a scheduler sends it: from a process that is not the parent.
    subprocess.run(["kill", f"-{name.removeprefix('SIG')}", str(int(pids[0]))], check=True)
    numbers = [first, *(numbers for numbers, _ in batches)]
    assert torch.cat(numbers).tolist() == list(range(40))


def test_the_main_process_ends_it() -> None:
    batches = loader()
    next(batches)
    (worker,) = batches._workers
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(WAIT)
    assert worker.exitcode == 0
