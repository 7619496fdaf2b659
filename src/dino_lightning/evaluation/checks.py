"""Checks of the settings of an evaluation or of `dino embed`, before weights or images are read.

A check that belongs to one evaluation is in its own file; checks of values against the network or the images are at the
beginning of each evaluation.
"""

from collections.abc import Sequence
from typing import Any

import yaml

from dino_lightning.config import (
    SCHEMAS,
    BuiltinData,
    ClassificationEval,
    DevicesConfig,
    EvaluateConfig,
    TensorBoardLoggerConfig,
)
from dino_lightning.config.constraints import check_devices, check_values
from dino_lightning.config.dotted import format_value
from dino_lightning.config.paths import usable_path
from dino_lightning.errors import UserError
from dino_lightning.evaluation.registry import find_evaluation
from dino_lightning.models.frozen import FrozenNetwork

TRAINING_KEYS = ("batch_size_per_device", "prefetch_batches", "cache", "cache_resize", "shuffle_buffer")
"""Keys of `data` that only training uses."""


def check_evaluation(config: EvaluateConfig, *, overrides: Sequence[str] = ()) -> None:
    """All checks that need only the configuration and `overrides`, those of the command line."""
    check_values(config)
    _check_data(config)
    check_training_keys(overrides, TRAINING_KEYS, program="an evaluation", batch_key="eval.batch_size_per_device")
    _check_images_of_run(config, overrides)
    if isinstance(config.eval, ClassificationEval):
        check_resize(config.eval.image_size, config.eval.image_resize, prefix="eval.")
    check_trainer(config.trainer, program="an evaluation")
    if isinstance(config.logger, TensorBoardLoggerConfig):
        raise UserError(
            "logger=tensorboard: an evaluation has no curves; choose logger=wandb, or logger=csv for results.jsonl "
            "alone."
        )
    find_evaluation(config.eval).check(config.eval, config.data)


def check_training_keys(overrides: Sequence[str], keys: Sequence[str], *, program: str, batch_key: str) -> None:
    """Raise `UserError` for overrides of those `keys` of `data` that only training uses."""
    for override in overrides:
        key = override.lstrip("+~").split("=")[0]
        if key.startswith("data.") and key[5:] in keys:
            instead = f"; set {batch_key}" if key == "data.batch_size_per_device" else ""
            raise UserError(f"{override}: {key} is for training, {program} does not use it{instead}.")


def check_resize(image_size: int | None, image_resize: int | None, *, prefix: str) -> None:
    """Raise `UserError` for a resized image that is smaller than the center crop; `prefix` is that of the keys."""
    if image_resize is None:
        return
    if image_size is None:
        raise UserError(f"{prefix}image_resize={image_resize} needs {prefix}image_size, the size of the center crop.")
    if image_resize < image_size:
        raise UserError(
            f"{prefix}image_resize={image_resize} is smaller than {prefix}image_size={image_size}, the size of the "
            "center crop."
        )


def check_trainer(trainer: DevicesConfig, *, program: str) -> None:
    """Raise `UserError` for settings of a training loop, and for devices that this machine does not have."""
    if type(trainer) is not DevicesConfig:
        raise UserError(f"trainer: {program} has no training loop; use trainer=devices and set its keys.")
    check_devices(trainer)


def check_channels(network: FrozenNetwork, channels: int) -> None:
    """Raise `UserError` if the network does not accept images with this number of channels."""
    if network.channels != channels:
        raise UserError(
            f"data.channels={channels}: the network {network.name} expects images with {network.channels} channels."
        )


def _check_data(config: EvaluateConfig) -> None:
    kinds = find_evaluation(config.eval).data
    if not isinstance(config.data, kinds):
        options = [name for name, schema in SCHEMAS["data"].items() if issubclass(schema, kinds)]
        raise UserError(
            f"eval={_option('eval', config.eval)} does not work with data={_option('data', config.data)}; choose data="
            f"{' or '.join(options)}."
        )


def _check_images_of_run(config: EvaluateConfig, overrides: Sequence[str]) -> None:
    """Raise `UserError` for a run that was trained on other images when the command line names no images.

    `data` is then `builtin` only because that is the default.
    """
    if not isinstance(config.data, BuiltinData) or any(word.lstrip("+~").startswith("data") for word in overrides):
        return
    path = usable_path("checkpoint", config.checkpoint)
    files = [folder / "config.yaml" for folder in (path, *path.parents[:2])]
    try:
        if not path.exists():  # such as `timm:NAME`; a run in the working folder is unrelated
            return
        file = next((file for file in files if file.is_file()), None)
        data = yaml.safe_load(file.read_text())["data"] if file else {}
        images = {f"data.{key}={data[key]}" for key in ("path", "root", "name", "shards") if data.get(key)}
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return  # loading the network reports the problem
    if images:
        raise UserError(
            f"checkpoint={config.checkpoint} was trained on {' '.join(sorted(images))}; choose the images for the "
            "evaluation with data=, or use data=builtin for the built-in images."
        )


def _option(group: str, config: Any) -> str:
    return next((name for name, schema in SCHEMAS[group].items() if type(config) is schema), format_value(config))
