"""Where the time of our training step goes.

    python benchmarks/breakdown.py                              ViT-Ti/16 on a CPU, ViT-S/16 on a GPU
    python benchmarks/breakdown.py --backbone vit_base --precision bf16 --json
    python benchmarks/breakdown.py --set compute.fused=false       layer by layer

A real trainer takes real steps and is stopped between two of them. There each part runs by itself on the networks that
were training, forward and backward for the student, forward for the teacher, in the shapes of the step. Shares are of
the whole step; `rest` is what the parts do not explain: Lightning, drop path, sums of residual branches, glue. Beside
them stands each part's share of the counted operations (`flops.py`).
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from breakdown_parts import step_parts
from flops import Counts, step_flops
from rich.console import Console
from rich.table import Table
from step import add_setting, described, setting_of, with_defaults
from step_sides import configured, trainer_and_method
from step_windows import SHORTEST_EPOCH, Setting, noise_crops
from torch import Tensor

NAMES = {
    "patch_embedding": "patch embedding",
    "attention_linear": "attention: norm and linear layers",
    "attention": "attention: products",
    "attention_whole": "attention",
    "mlp": "MLP",
    "blocks": "blocks",
    "network": "backbone",
    "head_mlp": "head to its bottleneck",
    "prototypes": "prototypes and loss",
    "optimizer": "clip and optimizer",
    "ema": "EMA",
    "rest": "rest",
}
COUNTED_TOGETHER = {
    "attention_whole": ("attention_linear", "attention"),
    "blocks": ("attention_linear", "attention", "mlp"),
}
"""Parts that stand for several of `flops.py`; the others have their own names there."""


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Measure and print; returns what `--json` prints."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting(parser)
    parser.add_argument("--steps", type=int, help="whole steps, and turns of each part; 5 on a CPU, 20 on a GPU")
    parser.add_argument("--warmup", type=int, help="steps before; 2 on a CPU, 10 on a GPU")
    options = with_defaults(parser.parse_args(words), steps=(5, 20))
    setting = setting_of(options)
    stopped, flops = take_steps(setting, warmup=options.warmup, steps=options.steps)
    row = shares(stopped.parts, whole=stopped.whole, flops=flops)
    if setting.device == "cuda":
        times = {**stopped.parts, "whole": stopped.whole}
        row["milliseconds"] = {name: round(1000 * value, 3) for name, value in times.items()}
    row |= described(setting, words, program="breakdown") | {"steps": options.steps}
    show(row)
    if options.json:
        print(json.dumps(row))
    return row


def take_steps(setting: Setting, *, warmup: int, steps: int) -> tuple["Stopped", Counts]:
    """Train until the step has been taken apart; the counted operations beside it."""
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = configured(setting, output_dir=Path(folder))
        trainer, method = trainer_and_method(config)
        stopped = Stopped(method, setting, warmup=warmup, steps=steps)
        with contextlib.suppress(EOFError):
            trainer.fit(method, train_dataloaders=stopped)
    return stopped, step_flops(config.backbone, crops=config.crops, method=config.method)


@dataclass
class Stopped:
    """A loader that hands out batches and, when they are trained on, takes the step apart."""

    method: Any
    setting: Setting
    warmup: int
    steps: int
    whole: float = 0.0
    """Seconds of a step, and below of its parts."""
    parts: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return SHORTEST_EPOCH

    def __iter__(self) -> Iterator[list[Tensor]]:
        crops = noise_crops(self.setting)
        for _ in range(self.warmup):
            yield crops
        seconds = []
        for _ in range(self.steps):
            start = self.setting.now()
            yield crops
            seconds.append(self.setting.now() - start)
        self.whole = statistics.median(seconds)
        self.parts = self.take_apart(crops)
        raise EOFError  # a plain end would be that of an epoch

    def take_apart(self, crops: list[Tensor]) -> dict[str, float]:
        """Seconds of each part; the parts take turns."""
        parts = step_parts(self.method, [crop.to(self.setting.device) for crop in crops], self.setting)
        for part in parts:
            part.run()
        turns: list[list[float]] = [[] for _ in parts]
        for _ in range(self.steps):
            for part, seconds in zip(parts, turns, strict=True):
                start = self.setting.now()
                part.run()
                seconds.append((self.setting.now() - start) * part.times)
        total: dict[str, float] = {}
        for part, seconds in zip(parts, turns, strict=True):
            total[part.name] = total.get(part.name, 0.0) + statistics.median(seconds)
        return total


def shares(parts: dict[str, float], *, whole: float, flops: Counts) -> dict[str, Any]:
    """Per cent of the step's time and of its counted operations."""
    times = {**parts, "rest": whole - sum(parts.values())}
    counts = {name: sum(flops.get(own, 0.0) for own in COUNTED_TOGETHER.get(name, (name,))) for name in times}
    of_flops = {name: round(100 * counts[name] / sum(flops.values()), 2) for name in NAMES if counts.get(name)}
    return {
        "share": {name: round(100 * times[name] / whole, 2) for name in NAMES if name in times},
        "share_of_flops": of_flops,
    }


def show(row: dict[str, Any]) -> None:
    """The table."""
    milliseconds = row.get("milliseconds", {})
    told = ["ms"] if milliseconds else []
    table = Table("Part", "% of the step", "% of the operations", *told, title=row["device"])
    for name, share in row["share"].items():
        counted = row["share_of_flops"].get(name)
        cells = [f"{share:.1f}", "" if counted is None else f"{counted:.1f}"]
        table.add_row(NAMES[name], *cells, *(str(milliseconds.get(name, "")) for _ in told))
    Console().print(table)


if __name__ == "__main__":
    main()
