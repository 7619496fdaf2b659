"""Whether our training step waits for the host or for the GPU, and which kernels it consists of.

    python benchmarks/kernels.py --precision bf16                      ViT-S/16 on a GPU
    python benchmarks/kernels.py --precision bf16 --backbone vit_base --set compute.attention=varlen --json

A real trainer takes real steps: first some timed steps, then three steps with PyTorch's profiler. If the sum of the
kernels is close to the step time, the GPU is the limit; if it is much lower, the host is, which launches the kernels
one by one. On a CPU, operators are reported instead of kernels.
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
from step_batches import EPOCH_STEPS, Setting, noise_crops
from step_sides import configured, trainer_and_method
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

PROFILED_STEPS = 3
TABLE_ROWS = 30


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print; returns the object that `--json` prints."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting(parser)
    parser.add_argument("--steps", type=int, help="timed steps; default: 2 on a CPU, 12 on a GPU")
    parser.add_argument("--warmup", type=int, help="steps before the timed ones; default: 2 on a CPU, 10 on a GPU")
    options = with_defaults(parser.parse_args(arguments), steps=(2, 12))
    setting = setting_of(options)
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    loader = ProfiledBatches(setting, warmup=options.warmup, steps=options.steps)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer, method = trainer_and_method(configured(setting, output_dir=Path(folder)))
        with contextlib.suppress(EOFError):
            trainer.fit(method, train_dataloaders=loader)
    show(loader.kernels)
    row = loader.row() | described(setting, arguments, program="kernels") | {"steps": options.steps}
    if options.json:
        print(json.dumps(row))
    return row


@dataclass
class ProfiledBatches:
    """A data loader that yields batches, times the steps on them and profiles the last ones."""

    setting: Setting
    warmup: int
    steps: int
    seconds: float = 0.0
    """Seconds per step, without a profiler and without waiting between steps."""
    kernels: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Kernel name -> milliseconds and launches per step."""

    def __len__(self) -> int:
        return EPOCH_STEPS

    def __iter__(self) -> Iterator[list[Tensor]]:
        crops, on_gpu = noise_crops(self.setting), self.setting.device == "cuda"
        for _ in range(self.warmup):
            yield crops
        start = self.setting.now()
        for _ in range(self.steps):
            yield crops
        self.seconds = (self.setting.now() - start) / self.steps
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            for _ in range(PROFILED_STEPS):
                yield crops
            self.setting.now()
        self.kernels = self.summed(profiler.events() or [])
        raise EOFError  # returning would only end the epoch

    def summed(self, events: Any) -> dict[str, tuple[float, float]]:
        """Means over the profiled steps, sorted by time."""
        on_gpu, totals = self.setting.device == "cuda", {}
        for event in events:
            if on_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
                continue
            spent = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
            milliseconds, launches = totals.get(event.name, (0.0, 0.0))
            totals[event.name] = (milliseconds + spent / 1000 / PROFILED_STEPS, launches + 1 / PROFILED_STEPS)
        return dict(sorted(totals.items(), key=lambda item: -item[1][0]))

    def row(self) -> dict[str, Any]:
        """The results."""
        milliseconds, launches = (sum(each[i] for each in self.kernels.values()) for i in (0, 1))
        return {
            "step_ms": round(1000 * self.seconds, 2),
            "kernels_ms": round(milliseconds, 2),
            "launches": round(launches),
            "images_per_second": round(self.setting.batch / self.seconds, 1),
        }


def show(kernels: dict[str, tuple[float, float]]) -> None:
    """Print the kernels that take the most time."""
    table = Table("Kernel", "ms", "launches")
    for name, (milliseconds, launches) in list(kernels.items())[:TABLE_ROWS]:
        table.add_row(name[:90], f"{milliseconds:.3f}", f"{launches:.0f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
