"""What both sides of `step.py` train, the loader that stops and starts them, and their memory."""

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
EPOCHS, SHORTEST_EPOCH = 100, 1000
"""Of the schedules; a comparison takes place within the first epoch."""


@dataclass(frozen=True)
class Setting:
    """What both sides train."""

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
    """Further settings of ours, as for `train.py`."""
    data: str | None = None
    """A folder of class folders; None for the same crops of noise in every step."""
    workers: int = 0
    """Loader processes, with `data`."""
    most_steps: int = SHORTEST_EPOCH

    @property
    def convolutional(self) -> bool:
        """Whether the original trains it with SGD."""
        return not self.backbone.startswith("vit")

    def now(self) -> float:
        """A clock (seconds), read when the GPU has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Windows:
    """A sized loader that hands out batches as it is told: what Lightning and the original see of this benchmark.

    Commands through the pipe: a number of steps, `matrix rate`, `stop`. Lightning looks one batch ahead only where a
    loader has no length, so a window ends when its last step has ended.
    """

    def __init__(self, pipe: Connection, setting: Setting) -> None:
        self.pipe, self.setting = pipe, setting
        self.batches: Iterable[Any] = ()
        self.facts: dict[str, Any] = {}
        """What the other end of the pipe is told before the first window."""
        self.memory: Memory | None = None

    def __len__(self) -> int:
        return max(SHORTEST_EPOCH, self.setting.most_steps + 1)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batches)
        self.pipe.send(("ready", self.facts))
        while True:
            steps = self.pipe.recv()
            if steps == "stop":
                raise EOFError  # a plain end would be that of an epoch
            if steps == "matrix rate":
                self.pipe.send(("done", matrix_rate(self.setting.device, precision=self.setting.precision)))
                continue
            self.memory = self.memory or Memory(self.setting.device)
            signal_workers(signal.SIGCONT)
            start = self.setting.now()
            for _ in range(steps):
                yield next(batches)
            seconds = self.setting.now() - start
            signal_workers(signal.SIGSTOP)  # or they would fill their queues in the other side's time
            self.pipe.send(("done", {"seconds": seconds, "memory": self.memory.peak()}))


def signal_workers(number: signal.Signals) -> None:
    """Stop or continue the loader processes."""
    for worker in multiprocessing.active_children():
        if worker.pid is not None:
            os.kill(worker.pid, number)


class Memory:
    """Peak memory from now on (MB)."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
        self.start = self.resident()

    def peak(self) -> dict[str, float]:
        """On a GPU `allocated`; else `resident`, the whole process, and `over_start`, what the steps added."""
        if self.device == "cuda":
            return {"allocated": torch.cuda.max_memory_allocated() / 1e6}
        return {"resident": self.resident(), "over_start": self.resident() - self.start}

    @staticmethod
    def resident() -> float:
        """Largest resident size of this process so far."""
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024 / 1e6
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def noise_crops(setting: Setting) -> list[Tensor]:
    """Two global and some local crops (B, 3, size, size), the same on each call."""
    generator = torch.Generator().manual_seed(1)
    sizes = [GLOBAL_SIZE] * 2 + [LOCAL_SIZE] * setting.local_crops
    crops = [torch.randn(setting.batch, 3, size, size, generator=generator) for size in sizes]
    return [crop.pin_memory() for crop in crops] if setting.device == "cuda" else crops
