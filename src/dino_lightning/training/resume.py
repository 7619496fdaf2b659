"""A run that goes on keeps what decides its numbers: its settings against those in the folder's `config.yaml`.

Free are loggers, callbacks, devices, loader processes, places of files and the settings of speed. The length of the run
may change, as users of Lightning expect, but it is said: the schedules span the run, so they change with it. All else
is refused in one sentence. Whoever means it writes the new value into `config.yaml` as well: that file says what the
folder holds.
"""

import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from dino_lightning.checkpoints.run_checkpoint import list_checkpoints
from dino_lightning.config import SCHEMAS, TrainConfig
from dino_lightning.config.dotted import flatten, format_value
from dino_lightning.errors import UserError, did_you_mean
from dino_lightning.runtime.scheduler import starts_again

DECISIVE = (
    "backbone.",
    "method.",
    "crops.",
    "data.",
    "optim.",
    "seed",
    "init_",
    "trainer.precision",
    "trainer.limit_train_batches",
    "trainer.overfit_batches",
)
"""Keys, or beginnings of keys, that decide what is trained."""
FREE = (
    "data.batch_size_per_device",  # with devices and accumulation: `check_total_batch`
    "data.cache",
    "data.cache_dir",
    "data.csv",
    "data.download",
    "data.max_bad_share",
    "data.num_workers",
    "data.on_error",
    "data.path",
    "data.pin_memory",
    "data.prefetch_batches",
    "data.root",
    "data.shards",
    "method.evaluate",
)
"""Keys below those that do not, or that are judged elsewhere."""
LENGTH = ("trainer.max_epochs", "trainer.max_steps")
NETWORK = ("backbone", "method.out_dim", "method.head_")
"""Beginnings of keys that decide which weights there are."""
CHOSEN = ("backbone", "method", "data", "optim")
"""Groups in which another option has other keys."""


def check_same_run(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on in `folder` with a `config` (nested dictionaries) that would train something else."""
    file = folder / "config.yaml"
    if not file.exists():
        return  # somebody has moved the checkpoints alone; what does not fit the network fails when it is loaded
    try:
        before = yaml.safe_load(file.read_text())
        if not isinstance(before, dict):
            raise ValueError("it holds no keys")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"resume: {file} is not the configuration of a run ({' '.join(str(error).split())}); restore "
            "it, or remove it to go on without this check."
        ) from error
    _check_groups(before, config, folder)
    then, now = flatten(before), flatten(config)
    for key in LENGTH:
        if key in then and format_value(then[key]) != format_value(now.get(key)):
            print(
                f"WARNING: {key} was {format_value(then[key])} and is {format_value(now.get(key))}: from this step, "
                "the schedules are those of a run of the new length.",
                file=sys.stderr,
            )
    for key in sorted(then.keys() & now.keys()):  # a key of another version is no change of the user's
        if key.startswith(DECISIVE) and key not in FREE and format_value(then[key]) != format_value(now[key]):
            way = (
                "start anew in another output_dir"
                if key.startswith(NETWORK)
                else f"set it back, or write the new value into {file} as well if that is meant"
            )
            raise UserError(
                f"resume: {key} was {format_value(then[key])} and is now {format_value(now[key])}, which would train "
                f"something else; {way}."
            )


def check_total_batch(config: Mapping[str, Any], folder: Path, *, ranks_before: int, ranks: int) -> None:
    """Refuse another total batch than that of the checkpoint, which other devices alone may change, and say."""
    file = folder / "config.yaml"
    before = yaml.safe_load(file.read_text()) if file.exists() else config

    def per_rank(of: Mapping[str, Any]) -> int:
        return of["data"]["batch_size_per_device"] * (of["trainer"].get("accumulate_grad_batches") or 1)

    then, now = per_rank(before) * ranks_before, per_rank(config) * ranks
    if then == now:
        return
    text = (
        f"the total batch was {then} images ({ranks_before} ranks of {per_rank(before)}) and is {now} ({ranks} of "
        f"{per_rank(config)})"
    )
    if per_rank(before) == per_rank(config):
        print(
            f"WARNING: {text}; data.batch_size_per_device and trainer.accumulate_grad_batches can keep it.",
            file=sys.stderr,
        )
        return
    raise UserError(
        f"resume: {text}, which would train something else; set data.batch_size_per_device and "
        "trainer.accumulate_grad_batches so that it stays."
    )


def _check_groups(before: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> None:
    for group in CHOSEN:
        then, now = (_option(group, of.get(group)) for of in (before, config))
        if then and now and then != now:
            raise UserError(
                f"resume: {folder} holds a run with {group}={then}, and {group}={now} would train something else; set "
                "it back, or start anew in another output_dir."
            )


def _option(group: str, settings: Any) -> str | None:
    """The schema of a group's settings, by the keys that it shares most of; None for one that is not known."""
    keys = set(settings or {})
    shared = {
        name: len(keys & own) - len(keys ^ own)
        for name, schema in SCHEMAS[group].items()
        if (own := {field.name for field in fields(schema)})
    }
    best = max(shared, key=lambda name: shared[name])
    return best if keys else None


def resume_mode(config: TrainConfig) -> Any:
    """What the key `resume` means here: `"auto"` in place of False where a scheduler starts the command again."""
    return "auto" if config.resume is False and starts_again() else config.resume


def check_output_dir(config: TrainConfig) -> None:
    """Refuse an output folder that already contains a run, or that has nothing to resume."""
    if config.resume not in (True, False, "auto"):
        raise UserError(f"resume={config.resume}: {did_you_mean(config.resume, ('true', 'false', 'auto'))}")
    found = list_checkpoints(Path(config.output_dir) / "checkpoints")
    mode = resume_mode(config)
    if mode is True and not found:
        raise UserError(f"resume=true: output_dir={config.output_dir} has no checkpoints/last.ckpt to go on from.")
    if not mode and found:
        raise UserError(
            f"output_dir={config.output_dir} already holds a run; add resume=true to go on with it, or "
            "choose another folder."
        )
