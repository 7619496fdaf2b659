"""What the configuration of an evaluation must satisfy, checked before weights or images are read.

What only the network or the images can tell, the evaluations check themselves, first of all.
"""

from collections.abc import Sequence
from typing import Any

import yaml

from dino_lightning.config import (
    SCHEMAS,
    AttentionEval,
    BuiltinData,
    ClassificationEval,
    CopydaysData,
    CopyDetectionEval,
    DataConfig,
    DavisData,
    DevicesConfig,
    EvaluateConfig,
    EvaluationConfig,
    ImagesConfig,
    PicturesData,
    RetrievalEval,
    RevisitedData,
    TensorBoardLoggerConfig,
    VideoEval,
    VOCData,
)
from dino_lightning.config.constraints import check_devices, check_values
from dino_lightning.config.dotted import format_value
from dino_lightning.config.paths import usable_path
from dino_lightning.errors import UserError

TRAINING_KEYS = ("batch_size_per_device", "prefetch_batches", "cache", "cache_resize", "shuffle_buffer")
"""Keys of `data` that evaluation does not know."""


def kinds_of_data(config: EvaluationConfig) -> tuple[type[ImagesConfig], ...]:
    """The kinds of data that an evaluation takes."""
    match config:
        case RetrievalEval():
            return (RevisitedData,)
        case CopyDetectionEval():
            return (CopydaysData,)
        case VideoEval():
            return (DavisData,)
        case AttentionEval():
            return (VOCData, PicturesData, BuiltinData, DataConfig)
        case _:
            return (DataConfig,)


def check_evaluation(config: EvaluateConfig, *, overrides: Sequence[str] = ()) -> None:
    """Everything that the configuration alone can tell; `overrides` are the words of the command line."""
    check_values(config)
    _check_data(config, overrides)
    _check_images_of_run(config, overrides)
    _check_sizes(config.eval)
    _check_devices(config.trainer)
    if isinstance(config.logger, TensorBoardLoggerConfig):
        raise UserError(
            "logger=tensorboard: an evaluation has no curves; choose logger=wandb, or logger=csv for "
            "results.jsonl alone."
        )


def _check_data(config: EvaluateConfig, overrides: Sequence[str]) -> None:
    kinds = kinds_of_data(config.eval)
    if not isinstance(config.data, kinds):
        options = [name for name, schema in SCHEMAS["data"].items() if issubclass(schema, kinds)]
        raise UserError(
            f"eval={_name('eval', config.eval)} does not go with data={_name('data', config.data)}; choose data="
            f"{' or '.join(options)}."
        )
    for word in overrides:
        key = word.lstrip("+~").split("=")[0]
        if key.startswith("data.") and key[5:] in TRAINING_KEYS:
            instead = "; set eval.batch_size_per_device" if key == "data.batch_size_per_device" else ""
            raise UserError(f"{word}: {key} is for training, an evaluation does not use it{instead}.")


def _check_images_of_run(config: EvaluateConfig, overrides: Sequence[str]) -> None:
    """Who evaluates a run on images of their own without a word about images does not mean the built-in ones."""
    if not isinstance(config.data, BuiltinData) or any(word.lstrip("+~").startswith("data") for word in overrides):
        return
    path = usable_path("checkpoint", config.checkpoint)
    files = [folder / "config.yaml" for folder in (path, *path.parents[:2])]
    try:
        if not path.exists():  # `timm:NAME` is not of the run in whose folder it is evaluated
            return
        file = next((file for file in files if file.is_file()), None)
        data = yaml.safe_load(file.read_text())["data"] if file else {}
        theirs = {f"data.{key}={data[key]}" for key in ("path", "root", "name", "shards") if data.get(key)}
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return  # whoever reads the network says what is wrong
    if theirs:
        raise UserError(
            f"checkpoint={config.checkpoint} was trained on {' '.join(sorted(theirs))}: name the images of "
            "the evaluation with data=, or take data=builtin for the built-in ones."
        )


def _check_sizes(config: EvaluationConfig) -> None:
    if not isinstance(config, ClassificationEval) or config.image_resize is None:
        return
    if config.image_size is None:
        raise UserError(f"eval.image_resize={config.image_resize} needs eval.image_size, the center taken from it.")
    if config.image_resize < config.image_size:
        raise UserError(
            f"eval.image_resize={config.image_resize} is smaller than eval.image_size={config.image_size}, "
            "the center taken from it."
        )


def _check_devices(trainer: DevicesConfig) -> None:
    if type(trainer) is not DevicesConfig:
        raise UserError("trainer: an evaluation has no training loop; leave trainer=devices and set its keys.")
    check_devices(trainer)


def _name(group: str, config: Any) -> str:
    return next((name for name, schema in SCHEMAS[group].items() if type(config) is schema), format_value(config))
