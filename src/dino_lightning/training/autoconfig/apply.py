"""`auto.data=true`, `auto.machine=true`: look at images and machine, ask the rules, set every key the user did not."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dino_lightning.config import TrainConfig, TrainerConfig, ViTConfig
from dino_lightning.config.checks.training import CHOICES, RULES, check_config
from dino_lightning.config.constraints import check_values
from dino_lightning.config.dotted import format_value
from dino_lightning.data.bad_images import UNREADABLE, why_unreadable
from dino_lightning.data.decode import ORIENTATION, Decoder
from dino_lightning.data.module import MultiCropDataModule
from dino_lightning.data.sources import ImageSource
from dino_lightning.data.sources.base import FirstImages
from dino_lightning.errors import UserError
from dino_lightning.runtime.devices import trains_on_cpu
from dino_lightning.training.autoconfig.batch_size import largest_batch
from dino_lightning.training.autoconfig.data_rules import PAPER_GLOBAL, Suggestion, suggest_from_data
from dino_lightning.training.autoconfig.machine_rules import DatasetStats, suggest_for_machine, this_machine
from dino_lightning.training.resources import SHARED_MEMORY
from dino_lightning.training.resume import check_output_dir

SAMPLE = 64
"""Images whose sizes are read."""


@dataclass(frozen=True)
class AutoconfigResult:
    """What the rules were asked, and what they said."""

    images: int
    side: float
    """Median shorter side (pixels)."""
    total_batch: int
    epochs: float
    rows: list[Suggestion]


def autoconfigure(composed: DictConfig, *, cli_overrides: Sequence[str]) -> AutoconfigResult | None:
    """Write the suggestions into `composed` where its `suggest` or `suggest_machine` asks for them; None where neither
    does.

    `given` are the words of the command line: keys among them stay. A run that goes on keeps what it began with. The
    result depends on configuration, images and kind of machine alone, so all ranks have the same.
    """
    if not (composed.auto.data or composed.auto.machine):
        return None
    config = checked(composed)
    seen, rows = inspect_images(config), ConfigWriter(composed, given=cli_overrides)
    if config.auto.machine:
        rows.write(for_machine(config, seen, given=rows.given, named=cli_overrides))
        config = checked(composed)
    batch = config.data.batch_size_per_device * config.trainer.accumulate_grad_batches
    batch *= device_count(config.trainer) * config.trainer.num_nodes
    epochs = run_length_epochs(config.trainer, images=seen.images, total_batch=batch)
    if config.auto.data:
        kinds = {"method": config.method, "backbone": config.backbone, "optim": config.optim}
        rows.write(
            suggest_from_data(seen.images, side=seen.side, total_batch=batch, epochs=epochs, given=rows.given, **kinds)
        )
    if config.auto.machine and not trains_on_cpu(config.trainer.accelerator):
        config = checked(composed)
        check_config(config)  # before the steps of a trial
        check_output_dir(config)
        rows.write(fit_to_memory(config, given=rows.given, again=rows.before is not None))
    return AutoconfigResult(seen.images, seen.side, batch, epochs, rows.rows)


def checked(composed: DictConfig) -> TrainConfig:
    """As dataclasses, each value by itself in its range."""
    config = cast(TrainConfig, OmegaConf.to_object(composed))
    check_values(config, RULES, CHOICES)
    return config


class ConfigWriter:
    """Suggestions on their way into a configuration."""

    def __init__(self, composed: DictConfig, *, given: Sequence[str]) -> None:
        self.composed = composed
        self.given = {key: _plain(composed, key) for key in keys(given)}
        before = Path(composed.output_dir) / "config.yaml"
        going_on = composed.resume and before.exists()
        self.before = cast(DictConfig, OmegaConf.load(before)) if going_on else None
        self.rows: list[Suggestion] = []

    def write(self, rows: Iterable[Suggestion]) -> None:
        """Set the keys; of a run that goes on, to what it began with. The last suggestion for a key is its row."""
        for row in rows:
            row = row if self.before is None else as_before(row, self.before)
            OmegaConf.update(self.composed, row.key, row.value)
            self.rows = [other for other in self.rows if other.key != row.key] + [row]


def inspect_images(config: TrainConfig) -> DatasetStats:
    """The training images, and some that are spread evenly over them."""
    module = MultiCropDataModule(config.data, config.crops, seed=config.seed)
    train = module.sources.train
    source = train if isinstance(train, ImageSource) else FirstImages(train, images=SAMPLE)
    decoder, sides, turned, reason = Decoder(config.data), [], 0, ""
    for index in np.unique(np.linspace(0, len(source) - 1, SAMPLE).astype(int)).tolist():
        try:
            stored = decoder.stored(source.read(index))
            sides.append(min(stored.shape[:2] if isinstance(stored, np.ndarray) else stored.size))
            turned += not isinstance(stored, np.ndarray) and stored.getexif().get(ORIENTATION, 1) != 1
        except UNREADABLE as error:
            reason = reason or f"{source.describe(index)}: {why_unreadable(error)}"
    if not sides:
        key = "auto.data" if config.auto.data else "auto.machine"
        raise UserError(f"{key}=true: none of the images that were tried can be used ({reason})")
    return DatasetStats(module.num_images, float(np.median(sides)), labeled=module.labeled, turned=turned)


def for_machine(
    config: TrainConfig, seen: DatasetStats, *, given: Mapping[str, Any], named: Sequence[str]
) -> list[Suggestion]:
    """What the rule for machines says of this one."""
    memory = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    tiny = isinstance(config.backbone, ViTConfig) and not any(word.startswith("backbone=") for word in named)
    return suggest_for_machine(
        this_machine(config.trainer.accelerator, memory=memory),
        seen,
        crop=PAPER_GLOBAL if config.auto.data else config.crops.global_size,
        devices=device_count(config.trainer) if "trainer.devices" in given else None,
        widen=tiny,
        given=given,
    )


def fit_to_memory(config: TrainConfig, *, given: Mapping[str, Any], again: bool) -> list[Suggestion]:
    """Batch and accumulation for the memory of the device, by a trial; only named where the run goes on `again`."""
    wanted, pieces = config.data.batch_size_per_device, config.trainer.accumulate_grad_batches
    if {"data.batch_size_per_device", "trainer.accumulate_grad_batches"} & given.keys():
        return []
    fits = wanted if again else largest_batch(config)
    if fits == wanted and not again:
        return []
    why = f"{wanted} do not fit into the memory of the device"
    return [
        Suggestion("data.batch_size_per_device", fits, why),
        Suggestion("trainer.accumulate_grad_batches", pieces * -(-wanted // fits), "so that a step has as many images"),
    ]


def device_count(trainer: TrainerConfig) -> int:
    """Training processes on a machine, as Lightning reads `devices`; 1 for what it will refuse."""
    if isinstance(trainer.devices, list):
        return len(trainer.devices)
    text = str(trainer.devices).strip()
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if text in ("auto", "-1"):
        return 1 if trains_on_cpu(trainer.accelerator) else max(1, torch.cuda.device_count())
    return max(1, int(text)) if text.isdigit() else 1


def run_length_epochs(trainer: TrainerConfig, *, images: int, total_batch: int) -> float:
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


def print_suggestions(suggested: AutoconfigResult) -> None:
    """The table: what was chosen, and why."""
    length = f"{suggested.epochs:.3g} epoch{'s' * (suggested.epochs != 1)}"
    title = f"Suggested for {suggested.images:,} images of {suggested.side:.0f} px, total batch {suggested.total_batch}"
    table = Table(title=f"{title}, {length}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name, whole in (("Key", True), ("Value", True), ("Why", False)):
        table.add_column(name, no_wrap=whole)
    for row in suggested.rows:
        table.add_row(row.key, format_value(row.value), row.reason, style="bold" if row.yours else None)
    console = Console(stderr=True, highlight=False)
    console.print(table)
    console.print("Set any of them on the command line; auto.data=false auto.machine=false sets none.\n")


def _plain(config: DictConfig, key: str) -> Any:
    value = OmegaConf.select(config, key)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
