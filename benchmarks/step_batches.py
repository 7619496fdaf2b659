"""What both sides of `step.py` train on, the loader that controls and times them, and their memory use."""

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from flops import matrix_rate
from torch import Tensor

GLOBAL_SIZE, LOCAL_SIZE = 224, 96
EPOCHS, EPOCH_STEPS = 100, 1000
"""Length of the schedules. A comparison stays within the first epoch."""


@dataclass(frozen=True)
class Setting:
    """The training that both sides run."""

    backbone: str = "vit_small"
    patch: int = 16
    batch: int = 64
    prototypes: int = 65536
    local_crops: int = 8
    precision: str = "32"
    """`32`, `tf32` or `bf16`."""
    device: str = "cpu"
    threads: int = 1
    overrides: tuple[str, ...] = ()
    """Other settings of our side, as for `train.py`."""
    data: str | None = None
    """A folder of class folders; None uses the same crops of noise in every step."""
    workers: int = 0
    """Number of loader processes, with `data`."""
    max_steps: int = EPOCH_STEPS

    @property
    def convolutional(self) -> bool:
        """Whether it is a convolutional network, which the original trains with SGD."""
        return not self.backbone.startswith("vit")

    def now(self) -> float:
        """The clock in seconds, after the GPU has finished all its work."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class TimedBatches:
    """A data loader for Lightning and for the original that yields batches on command and times the steps between them.

    Commands come through the pipe: a number of steps, `matrix rate`, `stop`. The loader has a length, because Lightning
    prefetches a batch if there is none; so the time includes exactly the requested steps.
    """

    def __init__(self, pipe: Connection, setting: Setting) -> None:
        self.pipe, self.setting = pipe, setting
        self.source: Iterable[Any] = ()
        self.facts: dict[str, Any] = {}
        """Sent through the pipe before the first step."""
        self.memory: Memory | None = None

    def __len__(self) -> int:
        return max(EPOCH_STEPS, self.setting.max_steps + 1)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.source)
        self.pipe.send(("ready", self.facts))
        while True:
            steps = self.pipe.recv()
            if steps == "stop":
                raise EOFError  # returning would only end the epoch
            if steps == "matrix rate":
                self.pipe.send(("done", matrix_rate(self.setting.device, precision=self.setting.precision)))
                continue
            self.memory = self.memory or Memory(self.setting.device)
            signal_workers(signal.SIGCONT)
            start = self.setting.now()
            for _ in range(steps):
                yield next(batches)
            seconds = self.setting.now() - start
            signal_workers(signal.SIGSTOP)  # otherwise they would work while the other side is timed
            self.pipe.send(("done", {"seconds": seconds, "memory": self.memory.peak()}))


def signal_workers(number: signal.Signals) -> None:
    """Send SIGSTOP or SIGCONT to the loader processes."""
    for worker in multiprocessing.active_children():
        if worker.pid is not None:
            os.kill(worker.pid, number)


class Memory:
    """Peak memory since the creation of this object, in MB."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current size
        self.start = self.resident()

    def peak(self) -> dict[str, float]:
        """On a GPU `allocated`; on a CPU `resident` of the process, and `over_start`, the part that the steps added."""
        if self.device == "cuda":
            return {"allocated": torch.cuda.max_memory_allocated() / 1e6}
        return {"resident": self.resident(), "over_start": self.resident() - self.start}

    @staticmethod
    def resident() -> float:
        """Peak resident size of this process."""
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024 / 1e6
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def noise_crops(setting: Setting) -> list[Tensor]:
    """Two global crops and the local crops (B, 3, size, size) of noise; the same on each call."""
    generator = torch.Generator().manual_seed(1)
    sizes = [GLOBAL_SIZE] * 2 + [LOCAL_SIZE] * setting.local_crops
    crops = [torch.randn(setting.batch, 3, size, size, generator=generator) for size in sizes]
    return [crop.pin_memory() for crop in crops] if setting.device == "cuda" else crops
