"""Checks of a training configuration that need nothing but the configuration and the machine.

Each raises `UserError` with the key, its value and what was expected.
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from dino_lightning.config import ComputeConfig, TimmConfig, TrainConfig, ViTConfig
from dino_lightning.config.constraints import check_devices, check_timm_name, check_values, declared_ranges
from dino_lightning.config.dotted import format_value, get_dotted
from dino_lightning.config.duration import Duration
from dino_lightning.config.ranges import Duration as DurationRange
from dino_lightning.errors import UserError
from dino_lightning.runtime.devices import trains_on_cpu

SHARDED_PRECISIONS = ("32", "32-true", "bf16-mixed")
COMPILERS = ("g++", "clang++", "cl")


def check_config(config: TrainConfig) -> None:
    """Refuse values out of range and combinations that cannot be trained."""
    _check_half_weights(config)
    check_values(config)
    _check_backbone(config)
    _check_channels(config)
    _check_crops(config)
    _check_trainer(config)
    _check_compute(config)
    _check_method(config)
    _check_durations(config)
    _check_callbacks(config)


def duration_keys(config: TrainConfig) -> dict[str, str]:
    """The durations of a configuration by dotted key."""
    return {key: value for key, value, allowed in declared_ranges(config) if allowed is DurationRange and value}


def _check_half_weights(config: TrainConfig) -> None:
    trainer = config.trainer
    if str(trainer.precision) in ("16-true", "bf16-true"):
        raise UserError(
            f"trainer.precision={trainer.precision} would round the teacher's small steps away; set "
            "trainer.precision=bf16-mixed."
        )


def _check_backbone(config: TrainConfig) -> None:
    backbone = config.backbone
    if isinstance(backbone, TimmConfig):
        check_timm_name(backbone.name)
    if isinstance(backbone, ViTConfig) and backbone.width % backbone.heads:
        raise UserError(f"backbone.heads={backbone.heads} does not divide backbone.width={backbone.width}.")


def _check_crops(config: TrainConfig) -> None:
    crops, patch = config.crops, get_dotted(config, "backbone.patch_size")
    sizes = {"crops.global_size": crops.global_size, "crops.eval_size": crops.eval_size}
    if crops.local_count:
        sizes["crops.local_size"] = crops.local_size
    for key, size in sizes.items() if patch else ():
        if size % patch:
            near = max(patch, round(size / patch) * patch)
            raise UserError(f"{key}={size} is not a multiple of backbone.patch_size={patch}; the nearest is {near}.")
    if crops.eval_resize < crops.eval_size:
        raise UserError(
            f"crops.eval_resize={crops.eval_resize} is smaller than crops.eval_size={crops.eval_size}, the center crop "
            "taken from it."
        )


def _check_channels(config: TrainConfig) -> None:
    channels = config.data.channels
    for key in ("mean", "std"):
        values = getattr(config.crops, key)
        if len(values) != channels:
            raise UserError(
                f"crops.{key}={format_value(values)} has {len(values)} numbers, but data.channels={channels}; "
                "`dino data stats` prints those of your images."
            )
    if config.crops.backend == "pil" and channels not in (1, 3):
        raise UserError(
            f"crops.backend=pil supports 1 or 3 channels, not data.channels={channels}; set crops=cpu or crops=device."
        )


def _check_trainer(config: TrainConfig) -> None:
    trainer = config.trainer
    check_devices(trainer)
    endless = trainer.max_epochs in (None, -1)
    if endless and trainer.max_steps < 1:
        raise UserError("trainer.max_epochs=-1 needs a length in trainer.max_steps: the schedules span the run.")
    if not endless and trainer.max_epochs < 1:  # type: ignore[operator]
        raise UserError(f"trainer.max_epochs={trainer.max_epochs}: expected at least 1.")
    if not endless and (trainer.min_epochs or 0) > trainer.max_epochs:  # type: ignore[operator]
        raise UserError(
            f"trainer.min_epochs={trainer.min_epochs} is more than trainer.max_epochs={trainer.max_epochs}."
        )
    if trainer.strategy == "fsdp" and str(trainer.precision) not in SHARDED_PRECISIONS:
        raise UserError(
            f"trainer.strategy=fsdp does not work with trainer.precision={trainer.precision}; set "
            "trainer.precision=bf16-mixed or 32."
        )


def _check_compute(config: TrainConfig) -> None:
    compute, backbone, on_cpu = config.compute, config.backbone, trains_on_cpu(config.trainer.accelerator)
    if compute.attention == "varlen":
        setting = "compute.attention=varlen"
        half = str(config.trainer.precision) in ("bf16-mixed", "16-mixed")
        _require(isinstance(backbone, ViTConfig), setting, "backbone=vit_small or another ViT of conf/backbone")
        _require(compute.fused, setting, "compute.fused=true")
        _require(not on_cpu, setting, "a GPU")
        _require(half, setting, "trainer.precision=bf16-mixed")
    if isinstance(backbone, ViTConfig) and backbone.drop_path == "subset":
        _require(compute.fused, "backbone.drop_path=subset", "compute.fused=true")
        # The number of crops differs from block to block, so each block would be compiled separately.
        _require(not compute.compile, "backbone.drop_path=subset", "compute.compile=false")
    if compute.compile and on_cpu:
        compilers = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
        has_compiler = any(shutil.which(name) for name in compilers)
        _require(has_compiler, "compute.compile=true", "a C++ compiler such as g++ on a CPU")


def _require(met: bool, setting: str, requirement: str) -> None:
    if not met:
        raise UserError(f"{setting} needs {requirement}.")


def _check_method(config: TrainConfig) -> None:
    method, rows = config.method, config.compute.loss_rows
    for key, (other, value) in method.dependent_keys.items():
        current, default, other_value = getattr(method, key), getattr(type(method)(), key), getattr(method, other)
        has_effect = other_value == value if isinstance(value, str) else other_value > 0
        if current != default and not has_effect:
            raise UserError(
                f"method.{key}={format_value(current)} has no effect with method.{other}={format_value(other_value)}; "
                f"set method.{other}={value}, or do not set method.{key}."
            )
    if not method.uses_loss_rows and rows != ComputeConfig.loss_rows:
        raise UserError(
            f"compute.loss_rows={rows} applies only to method=dino; set compute.loss_rows={ComputeConfig.loss_rows}."
        )
    method.check(config)


def _check_durations(config: TrainConfig) -> None:
    epochs = config.trainer.max_epochs
    if epochs in (None, -1):
        return
    for key, text in duration_keys(config).items():
        duration = Duration.parse(text, key=key)
        if duration.unit == "ep" and duration.amount > epochs:  # type: ignore[operator]
            raise UserError(
                f"{key}={text} is longer than the run of trainer.max_epochs={epochs}; '10%' would scale with it."
            )


def _check_callbacks(config: TrainConfig) -> None:
    knn = config.callbacks.knn
    if knn.headline_k not in knn.k:
        raise UserError(
            f"callbacks.knn.headline_k={knn.headline_k} is not one of callbacks.knn.k={format_value(knn.k)}."
        )
    if not config.callbacks.pruning.enabled:
        return
    if not knn.enabled:
        raise UserError(
            "callbacks.pruning.enabled=true compares k-NN accuracies, but callbacks.knn.enabled=false; set one of them "
            "to the value of the other."
        )
    if not Path(config.output_dir).name.isdigit():
        raise UserError(
            "callbacks.pruning.enabled=true compares the runs of a sweep, and this is a single run; add --multirun, or "
            "set callbacks.pruning.enabled=false."
        )
    if find_spec("optuna") is None:
        raise UserError(
            'callbacks.pruning.enabled=true needs the package optuna: pip install "dino-lightning[optuna]", or set it '
            "to false."
        )
