"""Which checkpoint a run resumes from, and whether its settings still train the same thing.

A resumed run must keep all settings that decide its numbers; they are compared with `config.yaml` in the output folder.
Loggers, callbacks, devices, loader processes, file paths and performance settings may change. The length of the run may
change too, as users of Lightning expect, with a warning: the schedules span the run, so they change with it. Any other
change raises an error. To change such a setting on purpose, write the new value into `config.yaml` as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from dino_lightning.checkpoints.run_checkpoint import latest_valid, list_checkpoints
from dino_lightning.config import SCHEMAS, TrainConfig
from dino_lightning.config.dotted import flatten, format_value
from dino_lightning.config.registry import backbone_config
from dino_lightning.errors import UserError, did_you_mean
from dino_lightning.runtime.console import warn
from dino_lightning.runtime.files import CONF
from dino_lightning.runtime.scheduler import starts_again

TRAINER = ("trainer.precision", "trainer.limit_train_batches", "trainer.overfit_batches")
DECISIVE = ("backbone.", "method.", "crops.", "data.", "optim.", "seed", "init_", *TRAINER)
"""Keys, or prefixes of keys, that decide what is trained."""
PLACES = ("path", "root", "csv", "shards", "cache", "cache_dir")
READING = ("num_workers", "pin_memory", "prefetch_batches", "on_error", "max_bad_share", "download")
FREE = {"method.evaluate", "data.batch_size_per_device", *(f"data.{key}" for key in (*PLACES, *READING))}
"""Keys that may change nevertheless; `check_total_batch` compares the batch size, with devices and accumulation."""
LENGTH = ("trainer.max_epochs", "trainer.max_steps")
NETWORK = ("backbone", "method.out_dim", "method.head_")
"""Prefixes of keys that decide which weights there are."""
NAMING = ("name", "width", "depth", "heads")
"""Keys of a backbone that tell its options apart."""
GROUPS = ("backbone", "method", "data", "optim")
"""Configuration groups whose options have different keys."""


@dataclass(frozen=True)
class ResumeCheckpoint:
    """The checkpoint that a run resumes from."""

    path: Path
    step: int
    """Optimizer steps taken."""
    ranks: int
    """Training processes of the run that wrote it."""


def resume_mode(config: TrainConfig) -> Any:
    """The value of `resume`, but `"auto"` instead of False if a scheduler restarts the command."""
    return "auto" if config.resume is False and starts_again() else config.resume


def check_output_dir(config: TrainConfig) -> None:
    """Refuse an output folder that already contains a run, or that has nothing to resume."""
    if config.resume not in (True, False, "auto"):
        raise UserError(f"resume={config.resume}: {did_you_mean(config.resume, ('true', 'false', 'auto'))}")
    checkpoints, mode = list_checkpoints(Path(config.output_dir) / "checkpoints"), resume_mode(config)
    if mode is True and not checkpoints:
        raise UserError(
            f"resume=true: output_dir={config.output_dir} contains no checkpoints/last.ckpt to resume from."
        )
    if not mode and checkpoints:
        raise UserError(
            f"output_dir={config.output_dir} already contains a run. Set resume=true to continue it, or choose another "
            "folder."
        )


def find_checkpoint(config: TrainConfig) -> ResumeCheckpoint | None:
    """The newest valid checkpoint in the output folder; None for a new run."""
    latest = latest_valid(Path(config.output_dir) / "checkpoints") if resume_mode(config) else None
    if latest is None:
        return None
    path, content = latest
    return ResumeCheckpoint(path, step=content["global_step"], ranks=len(content.get("ranks", [0])))


def check_same_run(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse to resume the run in `folder` with a `config` (nested dictionaries) that would train something else."""
    file = folder / "config.yaml"
    if not file.exists():
        return  # only the checkpoints were moved here; loading fails if they do not fit the network
    try:
        saved = yaml.safe_load(file.read_text())
        if not isinstance(saved, dict):
            raise ValueError("it contains no keys")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"resume: {file} is not the configuration of a run ({' '.join(str(error).split())}); restore it, or delete "
            "it to resume without this check."
        ) from error
    for group in GROUPS:
        before, now = (_option(group, settings.get(group)) for settings in (saved, config))
        if before and now and before != now:
            if group == "backbone":
                before, now = _network(before, saved[group]), _network(now, config[group])
            raise UserError(
                f"resume: {folder} contains a run with {group}={before}, and {group}={now} would change the training; "
                "restore it, or start a new run in another output_dir."
            )
    old, new = ({key: format_value(value) for key, value in flatten(each).items()} for each in (saved, config))
    # Keys in one of them only come from another version of this package, not from the user.
    changed = [key for key in sorted(old.keys() & new.keys()) if old[key] != new[key]]
    for key in changed:
        if key in LENGTH:
            warn(f"{key} was {old[key]} and is now {new[key]}: from this step on, the schedules span the new length.")
        elif key.startswith(DECISIVE) and key not in FREE:
            advice = (
                "start a new run in another output_dir"
                if key.startswith(NETWORK)
                else f"restore the value, or write the new value into {file} if you want the change"
            )
            raise UserError(
                f"resume: {key} was {old[key]} and is now {new[key]}, which would change the training; {advice}."
            )


def check_total_batch(config: TrainConfig, *, ranks_before: int, ranks: int) -> None:
    """Refuse another total batch than the checkpoint's; if only the number of ranks changed it, warn."""
    file = Path(config.output_dir) / "config.yaml"
    now = config.data.batch_size_per_device * config.trainer.accumulate_grad_batches
    before = now
    if file.exists():
        saved = yaml.safe_load(file.read_text())
        before = saved["data"]["batch_size_per_device"] * (saved["trainer"].get("accumulate_grad_batches") or 1)
    if before * ranks_before == now * ranks:
        return
    message = (
        f"the total batch was {before * ranks_before} images ({_ranks(ranks_before)} with {before}) and is now "
        f"{now * ranks} ({_ranks(ranks)} with {now})"
    )
    if before != now:
        raise UserError(
            f"resume: {message}, which would change the training; set data.batch_size_per_device and "
            "trainer.accumulate_grad_batches so that the total batch stays the same."
        )
    warn(f"{message}; data.batch_size_per_device and trainer.accumulate_grad_batches can keep it the same.")


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count != 1)}"


def _option(group: str, settings: Any) -> str | None:
    """The option of a configuration group whose schema has most keys in common with these settings."""
    keys = set(settings or {})
    schemas = {name: {field.name for field in fields(schema)} for name, schema in SCHEMAS[group].items()}
    return max(schemas, key=lambda name: len(keys & schemas[name]) - len(keys ^ schemas[name])) if keys else None


def _network(option: str, settings: Mapping[str, Any]) -> str:
    """The file of `conf/backbone/` with the dataclass of this option and the same network, else the option."""
    schema = SCHEMAS["backbone"][option]
    for file in sorted((CONF / "backbone").glob("*.yaml")):
        known = backbone_config(file.stem)
        if type(known) is schema and all(
            settings.get(key) == getattr(known, key) for key in NAMING if hasattr(known, key)
        ):
            return file.stem
    return option
