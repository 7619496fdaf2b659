"""How much time each part of our training step takes.

    python benchmarks/breakdown.py                              ViT-Ti/16 on a CPU, ViT-S/16 on a GPU
    python benchmarks/breakdown.py --backbone vit_base --precision bf16 --json
    python benchmarks/breakdown.py --set compute.fused=false       reference implementation

A real trainer takes real steps. Between two of them, each part is timed alone on the networks in training and with the
shapes of the step: forward and backward for the student, forward for the teacher. Shares are relative to the step time;
`rest` is the time that the parts do not explain: Lightning, drop path, sums of residual branches. The table also has
each part's share of the counted operations (`flops.py`).
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
from step_batches import EPOCH_STEPS, Setting, noise_crops
from step_sides import configured, trainer_and_method
from torch import Tensor

NAMES = {
    "patch_embedding": "patch embedding",
    "attention_linear": "attention: norm and linear layers",
    "attention": "attention: products",
    "attention_complete": "attention",
    "mlp": "MLP",
    "blocks": "blocks",
    "network": "backbone",
    "head_mlp": "head up to its bottleneck",
    "prototypes": "prototypes and loss",
    "optimizer": "clip and optimizer",
    "ema": "EMA",
    "rest": "rest",
}
COUNTED_TOGETHER = {
    "attention_complete": ("attention_linear", "attention"),
    "blocks": ("attention_linear", "attention", "mlp"),
}
"""Parts that combine several parts of `flops.py`; the others have the same names there."""


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print; returns the object that `--json` prints."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting(parser)
    parser.add_argument("--steps", type=int, help="steps, and turns of each part; default: 5 on a CPU, 20 on a GPU")
    parser.add_argument("--warmup", type=int, help="steps before the timed ones; default: 2 on a CPU, 10 on a GPU")
    options = with_defaults(parser.parse_args(arguments), steps=(5, 20))
    setting = setting_of(options)
    timing, flops = take_steps(setting, warmup=options.warmup, steps=options.steps)
    row = shares(timing.parts, step=timing.step, flops=flops)
    if setting.device == "cuda":
        times = {**timing.parts, "step": timing.step}
        row["milliseconds"] = {name: round(1000 * value, 3) for name, value in times.items()}
    row |= described(setting, arguments, program="breakdown") | {"steps": options.steps}
    show(row)
    if options.json:
        print(json.dumps(row))
    return row


def take_steps(setting: Setting, *, warmup: int, steps: int) -> tuple["PartTimer", Counts]:
    """Train until all parts of the step are timed; returns the times and the counted operations."""
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = configured(setting, output_dir=Path(folder))
        trainer, method = trainer_and_method(config)
        timer = PartTimer(method, setting, warmup=warmup, steps=steps)
        with contextlib.suppress(EOFError):
            trainer.fit(method, train_dataloaders=timer)
    return timer, step_flops(config.backbone, crops=config.crops, method=config.method)


@dataclass
class PartTimer:
    """A data loader that yields batches, times the steps on them, and then times the parts of a step."""

    method: Any
    setting: Setting
    warmup: int
    steps: int
    step: float = 0.0
    """Seconds of a step."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds of each part of a step."""

    def __len__(self) -> int:
        return EPOCH_STEPS

    def __iter__(self) -> Iterator[list[Tensor]]:
        crops = noise_crops(self.setting)
        for _ in range(self.warmup):
            yield crops
        seconds = []
        for _ in range(self.steps):
            start = self.setting.now()
            yield crops
            seconds.append(self.setting.now() - start)
        self.step = statistics.median(seconds)
        self.parts = self.time_parts(crops)
        raise EOFError  # returning would only end the epoch

    def time_parts(self, crops: list[Tensor]) -> dict[str, float]:
        """Seconds of each part; the parts alternate."""
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


def shares(parts: dict[str, float], *, step: float, flops: Counts) -> dict[str, Any]:
    """Percentages of the step time and of the counted operations."""
    times = {**parts, "rest": step - sum(parts.values())}
    counts = {name: sum(flops.get(part, 0.0) for part in COUNTED_TOGETHER.get(name, (name,))) for name in times}
    of_flops = {name: round(100 * counts[name] / sum(flops.values()), 2) for name in NAMES if counts.get(name)}
    return {
        "share": {name: round(100 * times[name] / step, 2) for name in NAMES if name in times},
        "share_of_flops": of_flops,
    }


def show(row: dict[str, Any]) -> None:
    """Print the table."""
    milliseconds = row.get("milliseconds", {})
    columns = ["ms"] if milliseconds else []
    table = Table("Part", "% of the step time", "% of the operations", *columns, title=row["device"])
    for name, share in row["share"].items():
        counted = row["share_of_flops"].get(name)
        cells = [f"{share:.1f}", "" if counted is None else f"{counted:.1f}"]
        table.add_row(NAMES[name], *cells, *(str(milliseconds.get(name, "")) for _ in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
