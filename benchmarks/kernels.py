"""Whether our training step waits for the host or for the GPU, and which kernels it consists of.

    python benchmarks/kernels.py --precision bf16                      ViT-S/16 on a GPU
    python benchmarks/kernels.py --precision bf16 --backbone vit_base --set compute.attention=varlen --json

A real trainer takes real steps: some in a row by the clock, then three under PyTorch's profiler. Where the kernels' sum
is near the step's time, the GPU is the limit; where it is far below, the host is, which starts them one by one. On a
CPU the operators stand for the kernels.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from step import add_setting, described, setting_of, with_defaults
from step_sides import configured, trainer_and_method
from step_windows import SHORTEST_EPOCH, Setting, noise_crops
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

PROFILED = 3
ROWS = 30
"""Kernels in the table."""


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Measure and print; returns what `--json` prints."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting(parser)
    parser.add_argument("--steps", type=int, help="steps by the clock; 2 on a CPU, 12 on a GPU")
    parser.add_argument("--warmup", type=int, help="steps before; 2 on a CPU, 10 on a GPU")
    options = with_defaults(parser.parse_args(words), steps=(2, 12))
    setting = setting_of(options)
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    loader = Profiled(setting, warmup=options.warmup, steps=options.steps)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer, method = trainer_and_method(configured(setting, output_dir=Path(folder)))
        with contextlib.suppress(EOFError):
            trainer.fit(method, train_dataloaders=loader)
    show(loader.kernels)
    row = loader.row() | described(setting, words, program="kernels") | {"steps": options.steps}
    if options.json:
        print(json.dumps(row))
    return row


@dataclass
class Profiled:
    """A loader that hands out batches, times the steps and profiles some."""

    setting: Setting
    warmup: int
    steps: int
    seconds: float = 0.0
    """Of a step, without a profiler and without waiting between steps."""
    kernels: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Milliseconds and launches in a step, by kernel."""

    def __len__(self) -> int:
        return SHORTEST_EPOCH

    def __iter__(self) -> Iterator[list[Tensor]]:
        crops, on_gpu = noise_crops(self.setting), self.setting.device == "cuda"
        for _ in range(self.warmup):
            yield crops
        start = self.setting.now()
        for _ in range(self.steps):
            yield crops
        self.seconds = (self.setting.now() - start) / self.steps
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            for _ in range(PROFILED):
                yield crops
            self.setting.now()
        self.kernels = self.summed(profiler.events() or [])
        raise EOFError  # a plain end would be that of an epoch

    def summed(self, events: Any) -> dict[str, tuple[float, float]]:
        """Means over the profiled steps, the largest first."""
        on_gpu, found = self.setting.device == "cuda", {}
        for event in events:
            if on_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
                continue
            spent = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
            before = found.get(event.name, (0.0, 0.0))
            found[event.name] = (before[0] + spent / 1000 / PROFILED, before[1] + 1 / PROFILED)
        return dict(sorted(found.items(), key=lambda item: -item[1][0]))

    def row(self) -> dict[str, Any]:
        """The sums."""
        milliseconds, launches = (sum(each[i] for each in self.kernels.values()) for i in (0, 1))
        return {
            "step_ms": round(1000 * self.seconds, 2),
            "kernels_ms": round(milliseconds, 2),
            "launches": round(launches),
            "images_per_second": round(self.setting.batch / self.seconds, 1),
        }


def show(kernels: dict[str, tuple[float, float]]) -> None:
    """The longest ones."""
    table = Table("Kernel", "ms", "launches")
    for name, (milliseconds, launches) in list(kernels.items())[:ROWS]:
        table.add_row(name[:90], f"{milliseconds:.3f}", f"{launches:.0f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
