"""The types that every evaluation uses: the devices, one network on one dataset, and a result.

def evaluate(config: KNNEval, task: Task) -> Iterator[Result]: ...
"""

import atexit
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric
from PIL import Image
from rich.console import Console
from rich.text import Text
from torch import Tensor

from dino_lightning.config import DataConfig, DevicesConfig, ImagesConfig
from dino_lightning.data.sources import Splits, open_sources
from dino_lightning.errors import UserError
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.runtime.collectives import leave_group
from dino_lightning.runtime.console import progress


@dataclass(frozen=True)
class Result:
    """One figure."""

    metric: str
    """Its name, such as `top1_k20`."""
    value: float
    unit: str = "%"
    """`%`, or empty for a number without unit."""
    main: bool = False
    """Whether the table on the screen includes it."""
    details: dict[str, Any] = field(default_factory=dict)
    """Written to `results.jsonl` next to the value: choices made, values per sequence or query. JSON types only."""


@dataclass
class EvalContext:
    """Devices, precision, and messages on the screen."""

    fabric: Fabric
    show_progress: bool = True

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.fabric.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints messages."""
        return self.fabric.is_global_zero

    @property
    def search_device(self) -> torch.device:
        """The device of neighbor searches: a CUDA GPU or the CPU, because `nearest_neighbors` needs 64-bit `topk`."""
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    def set_threads(self, threads: int | None, *, num_nodes: int) -> None:
        """Give each CPU process `threads` threads, or an equal share of the cores."""
        if self.device.type == "cpu":
            processes = max(1, self.fabric.world_size // num_nodes)
            torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // processes))

    def forward(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`function` in the configured precision, with its result in float32."""

        def run(images: Tensor) -> Tensor:
            with self.fabric.autocast():
                return function(images).float()

        return run

    def progress(self, label: str, *, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A progress bar on the main process; call the yielded function with the number of finished units."""
        return progress(label, total=total, show=self.show_progress and self.is_main)

    def say(self, text: str, *, label: str = "") -> None:
        """Print a line after a bold label, on the main process only; brackets in names and paths are kept."""
        if self.is_main:
            console = Console(stderr=True, highlight=False)
            console.print(Text.assemble((label, "bold"), text), soft_wrap=True)  # a path in one piece can be copied


@dataclass
class Task:
    """One network on one dataset."""

    network: FrozenNetwork
    data: ImagesConfig
    context: EvalContext
    output: Path
    """Folder of all output: `pictures/`, `masks/`, `bad_images*.txt`."""
    seed: int = 0
    cache: Path | None = None
    """Folder of the feature cache; None disables it."""

    @cached_property
    def splits(self) -> Splits:
        """The training and validation images of `data`."""
        if not isinstance(self.data, DataConfig):
            raise UserError(f"data: this evaluation needs images to classify, not {type(self.data).__name__}.")
        return open_sources(self.data, seed=self.seed)

    @property
    def num_workers(self) -> int:
        """Loader processes: as configured, but at most one per core."""
        return min(self.data.num_workers, torch.multiprocessing.cpu_count())  # type: ignore[attr-defined]

    def save_picture(self, image: Image.Image, name: str, *, every_rank: bool = False) -> None:
        """Save `pictures/NAME.png` (`NAME_untrained.png` for the baseline) on the main process.

        With `every_rank`, each rank saves the image; the ranks then need different names.
        """
        if self.context.is_main or every_rank:
            image.save(self.picture_path(f"{name}.png"))

    def picture_path(self, file: str) -> Path:
        """The path of the picture or clip `file` in `pictures/`, which is created; the suffix of `file` stays."""
        name = Path(file)
        path = self.output / "pictures" / (file if self.network.trained else f"{name.stem}_untrained{name.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def launch(trainer: DevicesConfig) -> EvalContext:
    """The configured devices; starts the other processes."""
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
    return EvalContext(fabric, show_progress=trainer.enable_progress_bar)
