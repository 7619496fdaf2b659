"""What every evaluation is given, and what it gives back.

    def evaluate(config: KNNEval, task: Task) -> Iterator[Result]: ...

An evaluation yields results and saves pictures; who writes them down and where is not its matter.
"""

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from dino_lightning.config import (
    DataConfig,
    DevicesConfig,
    EvaluateConfig,
    ImagesConfig,
)
from dino_lightning.data.sources import Splits, open_sources
from dino_lightning.errors import UserError
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.runtime.collectives import leave_group


@dataclass(frozen=True)
class Result:
    """One figure."""

    metric: str
    """Its name, such as `top1_k20`."""
    value: float
    unit: str = "%"
    """`%`, or empty for a plain number."""
    main: bool = False
    """Whether it stands in the table on the screen."""
    details: dict[str, Any] = field(default_factory=dict)
    """What belongs to it in `results.jsonl`: choices made, values per sequence or query. Plain types only."""


@dataclass
class EvalContext:
    """Devices and the screen."""

    fabric: Fabric
    show_progress: bool = True

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.fabric.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.fabric.is_global_zero

    @property
    def search_device(self) -> torch.device:
        """Where neighbors are looked for: not on other accelerators, `nearest` needs 64-bit keys in `topk`."""
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    def forward(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`function` in the configured precision, its result in float32."""

        def run(images: Tensor) -> Tensor:
            with self.fabric.autocast():
                return function(images).float()

        return run

    @contextmanager
    def progress(self, what: str, *, total: int) -> Iterator[Callable[[int], None]]:
        """A bar with the time left, on the main process; within it, call the given function with a number of units."""
        console = Console(stderr=True)
        # Where it is no terminal, all that a bar leaves is empty lines.
        if not (self.show_progress and self.is_main and console.is_terminal):
            yield lambda _: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda units: bar.advance(task, units)

    def say(self, text: str) -> None:
        """A line for the person, once over all processes."""
        if self.is_main:
            Console(stderr=True, highlight=False).print(text)


@dataclass
class Task:
    """One network on one data set."""

    network: FrozenNetwork
    data: ImagesConfig
    runtime: EvalContext
    output: Path
    """Folder of what is written: `pictures/`, `masks/`, `bad_images*.txt`."""
    seed: int = 0
    cache: Path | None = None
    """Folder of the feature cache; None keeps nothing."""

    @cached_property
    def sources(self) -> Splits:
        """Labeled images of the data sets that training knows."""
        if not isinstance(self.data, DataConfig):
            raise UserError(f"data: this evaluation needs images to classify, not {type(self.data).__name__}.")
        return open_sources(self.data, seed=self.seed)

    @property
    def num_workers(self) -> int:
        """Loader processes: as configured, at most one for each core."""
        return min(self.data.num_workers, torch.multiprocessing.cpu_count())  # type: ignore[attr-defined]

    def picture(self, image: Image.Image, name: str, *, every_rank: bool = False) -> Path | None:
        """Save a picture as `pictures/NAME.png`, `NAME_untrained.png` for the baseline.

        On the main process; with `every_rank` on each, where the ranks have different pictures.
        """
        if not (self.runtime.is_main or every_rank):
            return None
        path = self.picture_path(f"{name}.png")
        image.save(path)
        return path

    def picture_path(self, file: str) -> Path:
        """Where to write the picture or clip `file`: its ending stays last. Makes the folder."""
        name = Path(file)
        suffix = "" if self.network.trained else "_untrained"
        folder = self.output / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name.stem}{suffix}{name.suffix}"


def start(config: EvaluateConfig) -> EvalContext:
    """The devices, with the other processes running."""
    fabric = launched(config.trainer)
    fabric.seed_everything(config.seed, verbose=False)
    set_threads(fabric, config.cpu_threads, num_nodes=config.trainer.num_nodes)
    return EvalContext(fabric, show_progress=config.trainer.enable_progress_bar)


def launched(trainer: DevicesConfig) -> Fabric:
    """Fabric on the configured devices, with the other processes running."""
    try:
        fabric = Fabric(
            accelerator=trainer.accelerator,
            devices=trainer.devices,
            num_nodes=trainer.num_nodes,
            strategy=trainer.strategy,
            precision=trainer.precision,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    fabric.launch()
    atexit.register(leave_group)
    return fabric


def set_threads(fabric: Fabric, threads: int | None, *, num_nodes: int) -> None:
    """Give each process on a CPU its share of the cores, or `threads`."""
    if fabric.device.type == "cpu":
        processes = max(1, fabric.world_size // num_nodes)
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // processes))
