"""Repeat a saved non-finite step, to see where it begins.

usage: dino replay FILE [key=value]

FILE is nonfinite/stepNNNNNN-rankR.pt in the folder of a run. Exit status: 0 if something is non-finite again,
3 if not.

Examples:
  dino replay outputs/RUN/nonfinite/step000130-rank0.pt
  dino replay outputs/RUN/nonfinite/step000130-rank0.pt layers=true device=cuda
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from dino_lightning.cli.options import parse_options
from dino_lightning.cli.plugins import with_imports
from dino_lightning.errors import UserError
from dino_lightning.training.debug.replay import replay, table, verdict
from dino_lightning.training.debug.step_dump import read_step

REPRODUCED, NOT_REPRODUCED = 0, 3
"""Exit status."""


@dataclass
class Options:
    """Keys of `dino replay`."""

    file: Path
    """A file of a run's `nonfinite/`: the plain word."""
    device: Literal["cpu", "cuda"] = "cpu"
    """`cpu` or `cuda`."""
    layers: bool = False
    """Run every layer by itself, so that the modules within a block are visible."""
    imports: str | None = None
    """Python file with a method of yours, as for dino train."""


def main(words: list[str]) -> int:
    """Replay the step; returns 0 if something is non-finite again, 3 if not."""
    options = parse_options(Options, words, program="dino replay")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: this machine has no GPU; leave it out.")
    if options.imports:
        with_imports([f"imports={options.imports}"])
    saved = read_step(options.file)
    replayed = replay(saved, source=str(options.file), device=torch.device(options.device), layers=options.layers)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(table(saved, replayed))
    console.print(verdict(saved, replayed), soft_wrap=True)
    return REPRODUCED if replayed.reproduced else NOT_REPRODUCED
