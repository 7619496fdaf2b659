"""`suggest=true`: look at the images, ask the rule of `suggest`, and set every key that the user did not."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dino_lightning.checks import CHOICES, RULES
from dino_lightning.config import TrainConfig, TrainerConfig
from dino_lightning.config.rules import check_values, shown
from dino_lightning.data.bad_images import UNREADABLE, why_unreadable
from dino_lightning.data.decode import Decoder
from dino_lightning.data.sources import ImageSource, open_sources
from dino_lightning.data.sources.base import Beginning
from dino_lightning.distributed import trains_on_cpu
from dino_lightning.errors import UserError
from dino_lightning.suggest import Suggestion, suggest

SAMPLE = 64
"""Images whose sizes are read."""


@dataclass(frozen=True)
class Suggested:
    """What the rule was asked, and what it said."""

    images: int
    side: float
    """Median shorter side (pixels)."""
    total_batch: int
    epochs: float
    rows: list[Suggestion]


def suggest_settings(composed: DictConfig, *, given: Sequence[str]) -> Suggested | None:
    """Write the suggestions into `composed` where its `suggest` asks for them; None where it does not.

    `given` are the words of the command line: keys among them stay. A run that goes on keeps what it began with. The
    result depends on configuration and images alone, so all ranks have the same.
    """
    if not composed.suggest:
        return None
    config = cast(TrainConfig, OmegaConf.to_object(composed))
    check_values(config, RULES, CHOICES)
    images, side = look(config)
    batch = config.data.batch_size_per_device * config.trainer.accumulate_grad_batches
    batch *= devices(config.trainer) * config.trainer.num_nodes
    found = Suggested(images, side, batch, length(config.trainer, images=images, total_batch=batch), [])
    rows = suggest(
        images,
        side=side,
        total_batch=batch,
        epochs=found.epochs,
        method=config.method,
        backbone=config.backbone,
        optim=config.optim,
        given={key: _plain(composed, key) for key in keys(given)},
    )
    before = Path(config.output_dir) / "config.yaml"
    if config.resume and before.exists():
        rows = [as_before(row, cast(DictConfig, OmegaConf.load(before))) for row in rows]
    for row in rows:
        OmegaConf.update(composed, row.key, row.value)
    return replace(found, rows=rows)


def look(config: TrainConfig) -> tuple[int, float]:
    """Number of training images, and the median shorter side (pixels) of some that are spread evenly over them."""
    train = open_sources(config.data, seed=config.seed).train
    source = train if isinstance(train, ImageSource) else Beginning(train, images=SAMPLE)
    decoder, sides, reason = Decoder(config.data), [], ""
    for index in np.unique(np.linspace(0, len(source) - 1, SAMPLE).astype(int)).tolist():
        try:
            stored = decoder.stored(source.read(index))
            sides.append(min(stored.shape[:2] if isinstance(stored, np.ndarray) else stored.size))
        except UNREADABLE as error:
            reason = reason or f"{source.describe(index)}: {why_unreadable(error)}"
    if not sides:
        raise UserError(f"suggest=true: none of the images that were tried can be used ({reason})")
    return len(train) if isinstance(train, ImageSource) else train.images, float(np.median(sides))


def devices(trainer: TrainerConfig) -> int:
    """Training processes on a machine, as Lightning reads `devices`; 1 for what it will refuse."""
    if isinstance(trainer.devices, list):
        return len(trainer.devices)
    text = str(trainer.devices).strip()
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if text in ("auto", "-1"):
        return 1 if trains_on_cpu(trainer.accelerator) else max(1, torch.cuda.device_count())
    return max(1, int(text)) if text.isdigit() else 1


def length(trainer: TrainerConfig, *, images: int, total_batch: int) -> float:
    """Of the run, in epochs."""
    limits = [float(trainer.max_epochs)] if trainer.max_epochs not in (None, -1) else []  # type: ignore[arg-type]
    if trainer.max_steps > 0:
        limits.append(trainer.max_steps * total_batch / images)
    return min(limits, default=100.0)


def keys(words: Iterable[str]) -> list[str]:
    """The keys that words of the command line set, such as `optim.lr=1`."""
    names = [word.lstrip("+").partition("=")[0] for word in words if "=" in word]
    return [name for name in names if "." in name and "@" not in name]


def as_before(row: Suggestion, before: DictConfig) -> Suggestion:
    """What an earlier part of the run had, which its checkpoint fits."""
    value = _plain(before, row.key)
    return row if row.yours or value is None else replace(row, value=value, reason="as when the run began")


def show(suggested: Suggested) -> None:
    """The table: what was chosen, and why."""
    length = f"{suggested.epochs:.3g} epoch{'s' * (suggested.epochs != 1)}"
    title = f"Suggested for {suggested.images:,} images of {suggested.side:.0f} px, total batch {suggested.total_batch}"
    table = Table(title=f"{title}, {length}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name, whole in (("Key", True), ("Value", True), ("Why", False)):
        table.add_column(name, no_wrap=whole)
    for row in suggested.rows:
        table.add_row(row.key, shown(row.value), row.reason, style="bold" if row.yours else None)
    console = Console(stderr=True, highlight=False)
    console.print(table)
    console.print("Set any of them on the command line; suggest=false sets none of them.\n")


def _plain(config: DictConfig, key: str) -> Any:
    value = OmegaConf.select(config, key)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
