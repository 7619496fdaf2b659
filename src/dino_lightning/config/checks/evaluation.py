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
from dino_lightning.config.constraints import (
    BELOW_ONE,
    NEIGHBORS,
    POSITIVE,
    SHARE,
    Rule,
    at_least,
    check_devices,
    check_values,
)
from dino_lightning.config.dotted import format_value
from dino_lightning.config.paths import usable_path
from dino_lightning.errors import UserError

POSITIVES = Rule("one or more positive numbers", lambda value: bool(value) and min(value) > 0)
SHARES = Rule("one or more shares above 0, up to 1", lambda value: bool(value) and all(0 < v <= 1 for v in value))
BETWEEN = Rule("a share above 0 and below 1", lambda value: 0 < value < 1)
SOME = Rule("one or more choices", bool)
POSITIONS = Rule("one or more positions of at least 0", lambda value: bool(value) and min(value) >= 0)


def per_kind(value: Any) -> list[Any]:
    """A number or a list of them, as a list: two evaluations may call a number and a list by one name."""
    return list(value) if isinstance(value, list) else [value]


BLOCKS = Rule("numbers of at least 1", lambda value: bool(per_kind(value)) and min(per_kind(value)) >= 1)
AVGPOOL = Rule("true, false, or for eval=linear_grid a list of them", lambda value: bool(per_kind(value)))

RULES: dict[str, Rule] = {
    "eval.batch_size_per_device": at_least(1),
    "eval.image_size": at_least(1),
    "eval.image_resize": at_least(2),  # as `crops.eval_resize`
    "eval.k": NEIGHBORS,
    "eval.temperatures": POSITIVES,
    "eval.n_per_class": at_least(1),
    "eval.bank": at_least(1),
    "eval.n_last_blocks": BLOCKS,
    "eval.avgpool": AVGPOOL,
    "eval.epochs": at_least(1),
    "eval.lr": POSITIVE,
    "eval.lr_end": at_least(0),
    "eval.lrs": POSITIVES,
    "eval.val_every_n_epochs": at_least(1),
    "eval.classifier_batch_size": at_least(1),
    "eval.holdout": BETWEEN,
    "eval.shares": SHARES,
    "eval.splits": at_least(1),
    "eval.c": POSITIVES,
    "eval.max_iterations": at_least(1),
    "eval.warmup_epochs": at_least(0),
    "eval.weight_decay": at_least(0),
    "eval.layer_decay": Rule("a factor above 0, up to 1", lambda value: 0 < value <= 1),
    "eval.drop_path_rate": BELOW_ONE,
    "eval.label_smoothing": BELOW_ONE,
    "eval.mixup": at_least(0),
    "eval.cutmix": at_least(0),
    "eval.random_erasing": SHARE,
    "eval.repeated_augmentation": at_least(1),
    "eval.ema_decay": BELOW_ONE,
    "eval.scales": POSITIVES,
    "eval.gem_power": POSITIVE,
    "eval.top": at_least(1),
    "eval.last_frames": at_least(0),
    "eval.neighborhood": at_least(0),
    "eval.temperature": POSITIVE,
    "eval.masses": SHARES,
    "eval.pictures": at_least(0),
    "eval.frames_per_second": POSITIVE,
    "eval.random_queries": at_least(1),
    "eval.neighbors": at_least(1),
    "data.num_workers": at_least(0),
    "data.channels": at_least(1),
    "data.max_bad_share": SHARE,
    "data.holdout": BELOW_ONE,
    "data.train_images": at_least(1),
    "data.val_images": at_least(1),
    "data.image_size": at_least(8),
    "trainer.num_nodes": at_least(1),
    "cpu_threads": at_least(1),
    "seed": Rule("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32),
}

CHOICES: dict[str, tuple[str, ...]] = {
    "eval.solver": ("device", "sklearn"),
    "checkpoint_key": ("teacher", "student"),
    "data.on_error": ("skip", "raise"),
}

DEVICES = {
    "accelerator": ("auto", "cpu", "gpu", "cuda", "mps"),
    "strategy": ("auto", "ddp"),
    "precision": ("32", "32-true", "16-mixed", "bf16-mixed"),
}

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
    check_values(config, RULES, CHOICES)
    # Others have keys of the same names with other values.
    if isinstance(config.eval, CopyDetectionEval):
        check_values(config, {}, {"eval.whitening": ("none", "original", "corrected")})
    if isinstance(config.data, RevisitedData):
        check_values(config, {}, {"data.name": ("roxford5k", "rparis6k")})
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
    check_devices(trainer, DEVICES)


def _name(group: str, config: Any) -> str:
    return next((name for name, schema in SCHEMAS[group].items() if type(config) is schema), format_value(config))
