"""`auto.data` and `auto.machine`: measure images and machine, apply the rules, set the keys of the configuration."""

import shutil
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

from dino_lightning.config import TrainConfig, TrainerConfig, ViTConfig
from dino_lightning.config.dotted import format_value
from dino_lightning.data.bad_images import UNREADABLE, why_unreadable
from dino_lightning.data.decode import ORIENTATION, Decoder
from dino_lightning.data.module import MultiCropDataModule
from dino_lightning.data.sources import ImageSource
from dino_lightning.data.sources.base import FirstImages, evenly_spaced
from dino_lightning.errors import UserError
from dino_lightning.runtime.devices import trains_on_cpu
from dino_lightning.training import preflight
from dino_lightning.training.autoconfig.batch_size import largest_batch, listed_devices
from dino_lightning.training.autoconfig.data_rules import PAPER_GLOBAL, DatasetStats, Suggestion, suggest_from_data
from dino_lightning.training.autoconfig.machine_rules import suggest_from_machine, this_machine
from dino_lightning.training.resources import SHARED_MEMORY

SAMPLE_IMAGES = 64
"""Images whose sizes are read."""


@dataclass(frozen=True)
class AutoconfigResult:
    """What the rules were applied to, and what they suggested."""

    stats: DatasetStats
    total_batch: int
    epochs: float
    suggestions: list[Suggestion]


def autoconfigure(composed: DictConfig, *, cli_overrides: Sequence[str]) -> AutoconfigResult | None:
    """Write the suggestions that `auto.data` and `auto.machine` ask for into `composed`; None if neither is set.

    Keys among `cli_overrides` keep their values. A resumed run keeps the values it started with. The result depends
    only on configuration, images and machine type, so it is the same on all ranks.
    """
    if not (composed.auto.data or composed.auto.machine):
        return None
    config, writer = preflight.typed_config(composed), ConfigWriter(composed, cli_overrides)
    stats = inspect_images(config)
    if config.auto.machine:
        writer.write(machine_suggestions(config, stats, writer))
        config = preflight.typed_config(composed)
    batch = config.data.batch_size_per_device * config.trainer.accumulate_grad_batches
    batch *= device_count(config.trainer) * config.trainer.num_nodes
    epochs = run_length_epochs(config.trainer, images=stats.images, total_batch=batch)
    if config.auto.data:
        suggestions = suggest_from_data(
            stats.images,
            side=stats.side,
            total_batch=batch,
            epochs=epochs,
            method=config.method,
            backbone=config.backbone,
            optim=config.optim,
            user_values=writer.user_values,
        )
        writer.write(suggestions)
    if config.auto.machine and not trains_on_cpu(config.trainer.accelerator):
        config = preflight.typed_config(composed)
        preflight.check_combinations(config)  # before steps are tried
        writer.write(batch_suggestions(config, writer))
    return AutoconfigResult(stats, batch, epochs, writer.suggestions)


class ConfigWriter:
    """Writes suggestions into a configuration, and collects them."""

    def __init__(self, composed: DictConfig, cli_overrides: Sequence[str]) -> None:
        self.composed, self.cli_overrides = composed, cli_overrides
        self.user_values = {key: _plain_value(composed, key) for key in overridden_keys(cli_overrides)}
        file = Path(composed.output_dir) / "config.yaml"
        resumes = composed.resume and file.exists()
        self.resumed = cast(DictConfig, OmegaConf.load(file)) if resumes else None
        """The configuration that the resumed run started with, which its checkpoint fits."""
        self.suggestions: list[Suggestion] = []

    def write(self, suggestions: Iterable[Suggestion]) -> None:
        """Set the keys; a suggestion replaces an earlier one for the same key."""
        for suggestion in suggestions:
            value = None if self.resumed is None else _plain_value(self.resumed, suggestion.key)
            if value is not None and not suggestion.by_user:
                suggestion = replace(suggestion, value=value, reason="as when the run began")
            OmegaConf.update(self.composed, suggestion.key, suggestion.value)
            self.suggestions = [other for other in self.suggestions if other.key != suggestion.key] + [suggestion]


def inspect_images(config: TrainConfig) -> DatasetStats:
    """Count the training images, and measure a sample that is spread evenly over them."""
    module = MultiCropDataModule(config.data, config.crops, seed=config.seed)
    train = module.sources.train
    source = train if isinstance(train, ImageSource) else FirstImages(train, images=SAMPLE_IMAGES)
    decoder, sides, rotated, reason = Decoder(config.data), [], 0, ""
    for index in evenly_spaced(len(source), SAMPLE_IMAGES):
        try:
            stored = decoder.stored(source.read(index))
            sides.append(min(stored.shape[:2] if isinstance(stored, np.ndarray) else stored.size))
            rotated += not isinstance(stored, np.ndarray) and stored.getexif().get(ORIENTATION, 1) != 1
        except UNREADABLE as error:
            reason = reason or f"{source.describe(index)}: {why_unreadable(error)}"
    if not sides:
        key = "auto.data" if config.auto.data else "auto.machine"
        raise UserError(f"{key}=true: none of the tested images can be read ({reason})")
    return DatasetStats(module.num_images, float(np.median(sides)), labeled=module.labeled, rotated=rotated)


def machine_suggestions(config: TrainConfig, stats: DatasetStats, writer: ConfigWriter) -> list[Suggestion]:
    """The machine rule applied to this machine."""
    free_memory = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    chose_backbone = any(override.startswith("backbone=") for override in writer.cli_overrides)
    return suggest_from_machine(
        this_machine(config.trainer.accelerator, memory=free_memory),
        stats,
        crop=PAPER_GLOBAL if config.auto.data else config.crops.global_size,
        devices=device_count(config.trainer) if "trainer.devices" in writer.user_values else None,
        widen=isinstance(config.backbone, ViTConfig) and not chose_backbone,
        user_values=writer.user_values,
    )


def batch_suggestions(config: TrainConfig, writer: ConfigWriter) -> list[Suggestion]:
    """Batch and accumulation that fit into the memory of the device, found by trying; a resumed run keeps its own."""
    batch, accumulated = config.data.batch_size_per_device, config.trainer.accumulate_grad_batches
    if {"data.batch_size_per_device", "trainer.accumulate_grad_batches"} & writer.user_values.keys():
        return []
    fitting = batch if writer.resumed is not None else largest_batch(config)
    if fitting == batch and writer.resumed is None:
        return []
    accumulated *= -(-batch // fitting)
    return [
        Suggestion("data.batch_size_per_device", fitting, f"{batch} do not fit into the memory of the device"),
        Suggestion("trainer.accumulate_grad_batches", accumulated, "so that a step has as many images"),
    ]


def device_count(trainer: TrainerConfig) -> int:
    """Training processes per machine, as Lightning reads `devices`; 1 for values that it will refuse."""
    if listed := listed_devices(trainer.devices):
        return len(listed)
    text = str(trainer.devices).strip()
    if text in ("auto", "-1"):
        return 1 if trains_on_cpu(trainer.accelerator) else max(1, torch.cuda.device_count())
    return max(1, int(text)) if text.isdigit() else 1


def run_length_epochs(trainer: TrainerConfig, *, images: int, total_batch: int) -> float:
    """Length of the run in epochs."""
    limits = [float(trainer.max_epochs)] if trainer.max_epochs not in (None, -1) else []  # type: ignore[arg-type]
    if trainer.max_steps > 0:
        limits.append(trainer.max_steps * total_batch / images)
    return min(limits, default=100.0)


def overridden_keys(overrides: Iterable[str]) -> list[str]:
    """The dotted keys that command-line overrides such as `optim.lr=1` set."""
    names = [override.lstrip("+").partition("=")[0] for override in overrides if "=" in override]
    return [name for name in names if "." in name and "@" not in name]


def print_suggestions(result: AutoconfigResult) -> None:
    """Print what was chosen, and why, as a table."""
    length = f"{result.epochs:.3g} epoch{'s' * (result.epochs != 1)}"
    images = f"{result.stats.images:,} images of {result.stats.side:.0f} px"
    title = f"Suggested for {images}, total batch {result.total_batch}, {length}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name, no_wrap in (("Key", True), ("Value", True), ("Why", False)):
        table.add_column(name, no_wrap=no_wrap)
    for suggestion in result.suggestions:
        style = "bold" if suggestion.by_user else None
        table.add_row(suggestion.key, format_value(suggestion.value), suggestion.reason, style=style)
    console = Console(stderr=True, highlight=False)
    console.print(table)
    console.print("Set any of them on the command line; auto.data=false auto.machine=false sets none.\n")


def _plain_value(config: DictConfig, key: str) -> Any:
    value = OmegaConf.select(config, key)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
