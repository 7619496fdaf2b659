"""What a configuration must satisfy, checked before anything is built.

`check_config` needs the configuration alone; `check_data` needs the opened data set too. Each raises `UserError` with
the key, its value and what was expected.
"""

import math
from typing import Any

from dino_lightning.config import (
    TORCHVISION_NAMES,
    TimmConfig,
    TorchvisionData,
    TrainConfig,
    ViTConfig,
)
from dino_lightning.config.checks.compute import check_step
from dino_lightning.config.checks.method import check_method
from dino_lightning.config.checks.sweep import check_pruning
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
from dino_lightning.config.dotted import format_value, get_dotted
from dino_lightning.config.duration import Duration
from dino_lightning.config.timm_names import check_timm_name
from dino_lightning.errors import UserError, did_you_mean

PRECISIONS = ("32", "32-true", "16-mixed", "bf16-mixed", "64", "64-true")
STRATEGIES = ("auto", "ddp", "ddp_notebook", "ddp_find_unused_parameters_true", "fsdp")
SHARDED_PRECISIONS = ("32", "32-true", "bf16-mixed")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu", "hpu", "xpu")


AREAS = Rule(
    "two shares of the image, such as [0.05,0.4], the smaller first",
    lambda value: len(value) == 2 and 0 < value[0] <= value[1] <= 1,
)
RATIOS = Rule(
    "two numbers from 0.001 to 1000, the smaller first",
    lambda value: len(value) == 2 and 0.001 <= value[0] <= value[1] <= 1000,
)
RADII = Rule(
    "two positive numbers up to 1000, the smaller first",
    lambda value: len(value) == 2 and 0 < value[0] <= value[1] <= 1000,
)
STRENGTH = Rule("a number from 0 to 1000", lambda value: 0 <= value <= 1000)
MEANS = Rule("a number for each channel, at most a million", lambda value: all(abs(mean) <= 1e6 for mean in value))
DEVIATIONS = Rule(
    "a positive number for each channel, from a millionth to a million",
    lambda value: bool(value) and all(1e-6 <= std <= 1e6 for std in value),
)
PER_VIEW = Rule(
    "three probabilities: first global, second global, local crops",
    lambda value: len(value) == 3 and all(0 <= p <= 1 for p in value),
)
TWO_VALUES = Rule(
    "two numbers, the smaller first", lambda value: len(value) == 2 and -math.inf < value[0] < value[1] < math.inf
)
BATCHES = Rule(
    "a number of batches of at least 1, or a share of them above 0 and up to 1",
    lambda value: isinstance(value, int | float) and value > 0 and (isinstance(value, int) or value <= 1),
)
BETAS = Rule("two shares below 1", lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value))

RULES: dict[str, Rule] = {
    "backbone.drop_path_rate": BELOW_ONE,
    "backbone.width": at_least(1),
    "backbone.depth": at_least(1),
    "backbone.heads": at_least(1),
    "backbone.patch_size": at_least(1),
    "method.out_dim": at_least(2),
    "method.head_layers": at_least(1),
    "method.head_hidden_dim": at_least(1),
    "method.head_bottleneck_dim": at_least(1),
    "method.student_temperature": POSITIVE,
    "method.teacher_temperature": POSITIVE,
    "method.teacher_temperature_start": POSITIVE,
    "method.center_momentum": SHARE,
    "method.sinkhorn_iterations": at_least(1),
    "method.koleo_weight": at_least(0),
    "method.patch_loss_weight": at_least(0),
    "method.mask_p": SHARE,
    "method.mask_share": AREAS,
    "method.temperature": POSITIVE,
    "method.version": Rule("2 or 3", lambda value: value in (2, 3)),
    "method.sinkhorn_epsilon": POSITIVE,
    "method.queue_length": at_least(0),
    "method.loss_scale": POSITIVE,
    "method.label_smoothing": BELOW_ONE,
    "backbone.registers": at_least(0),
    "callbacks.collapse.patience": at_least(1),
    "method.teacher_momentum": SHARE,
    "method.teacher_momentum_end": SHARE,
    "crops.global_size": at_least(1),
    "crops.local_size": at_least(1),
    "crops.local_count": at_least(0),
    "crops.global_scale": AREAS,
    "crops.local_scale": AREAS,
    "crops.ratio": RATIOS,
    "crops.flip_p": SHARE,
    "crops.jitter_p": SHARE,
    "crops.brightness": STRENGTH,
    "crops.contrast": STRENGTH,
    "crops.saturation": STRENGTH,
    "crops.hue": Rule("a number of turns from 0 to 0.5", lambda value: 0 <= value <= 0.5),
    "crops.grayscale_p": SHARE,
    "crops.blur_p": PER_VIEW,
    "crops.blur_radius": RADII,
    "crops.solarize_p": PER_VIEW,
    "crops.solarize_threshold": Rule("a value from 0 to 256", lambda value: 0 <= value <= 256),
    "crops.mean": MEANS,
    "crops.std": DEVIATIONS,
    "crops.eval_resize": at_least(2),  # PyTorch cannot resize whole numbers to one pixel
    "crops.eval_size": at_least(1),
    "data.batch_size_per_device": at_least(1),
    "data.num_workers": at_least(0),
    "data.prefetch_batches": at_least(1),
    "data.channels": at_least(1),
    "data.value_range": TWO_VALUES,
    "data.max_bad_share": SHARE,
    "data.cache_resize": at_least(1),
    "data.images": at_least(1),
    "data.shuffle_buffer": at_least(1),
    "data.holdout": BELOW_ONE,
    "data.train_images": at_least(1),
    "data.val_images": at_least(1),
    "data.image_size": at_least(8),
    "optim.lr": at_least(0),
    "optim.lr_end": at_least(0),
    "optim.weight_decay": at_least(0),
    "optim.weight_decay_end": at_least(0),
    "optim.clip_grad": at_least(0),
    "optim.momentum": BELOW_ONE,
    "optim.betas": BETAS,
    "optim.trust_coefficient": POSITIVE,
    "trainer.num_nodes": at_least(1),
    "trainer.limit_train_batches": BATCHES,
    "trainer.overfit_batches": Rule(
        f"0 for no limit, {BATCHES.expected}", lambda value: value in (0, False) or BATCHES.holds(value)
    ),
    "trainer.fast_dev_run": Rule(
        "true, false, or a number of batches", lambda value: isinstance(value, int) and value >= 0
    ),
    "trainer.accumulate_grad_batches": at_least(1),
    "trainer.log_every_n_steps": at_least(1),
    "compute.loss_rows": at_least(1),
    "callbacks.knn.every_n_epochs": at_least(1),
    "callbacks.knn.k": NEIGHBORS,
    "callbacks.knn.temperature": POSITIVE,
    "callbacks.knn.bank": at_least(1),
    "callbacks.knn.queries": at_least(1),
    "callbacks.knn.batch_size_per_device": at_least(1),
    "callbacks.checkpoint.every_n_epochs": at_least(0),
    "callbacks.checkpoint.every_n_minutes": at_least(0),
    "callbacks.checkpoint.keep_last": at_least(1),
    "callbacks.nonfinite.max_steps": at_least(0),
    "callbacks.nonfinite.max_saved": at_least(0),
    "collective_timeout_s": at_least(1),
    "callbacks.pruning.after_jobs": at_least(1),
    "callbacks.pruning.keep_percent": Rule("a number above 0 and below 100", lambda value: 0 < value < 100),
    "callbacks.pictures.every_n_epochs": at_least(1),
    "callbacks.pictures.images": at_least(1),
    "cpu_threads": at_least(1),
    "seed": Rule("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32),
}

CHOICES: dict[str, tuple[Any, ...]] = {
    "method.teacher_update": ("ema", "copy_each_step", "previous_step", "copy_each_epoch"),
    "method.evaluate": ("teacher", "student"),
    "method.head_activation": ("gelu", "relu"),
    "method.loss": ("cross_entropy", "mse"),
    "method.centering": ("center", "sinkhorn", "softmax", "none"),
    "backbone.drop_path": ("sample", "subset"),
    "compute.attention": ("split", "varlen"),
    "compute.matmul_precision": ("highest", "high", "medium"),
    "callbacks.nonfinite.policy": ("stop", "skip", "rollback"),
    "crops.backend": ("pil", "cpu", "device"),
    "data.on_error": ("skip", "raise"),
    "trainer.deterministic": (True, False, "warn"),
    "data.cache": ("none", "ram", "disk"),
}

DURATIONS = (
    "method.freeze_last_layer",
    "method.teacher_temperature_warmup",
    "method.queue_start",
    "method.freeze_prototypes",
    "optim.lr_warmup",
    "callbacks.collapse.after",
    "callbacks.pruning.warmup",
)


def check_config(config: TrainConfig) -> None:
    """Everything that the configuration alone can tell."""
    check_values(config, RULES, CHOICES)
    _check_backbone(config)
    _check_channels(config)
    _check_crops(config)
    _check_trainer(config)
    check_step(config)
    check_method(config)
    _check_durations(config)
    _check_callbacks(config)


def _check_backbone(config: TrainConfig) -> None:
    backbone = config.backbone
    if isinstance(backbone, TimmConfig):
        check_timm_name(backbone.name)
    if isinstance(backbone, ViTConfig) and backbone.width % backbone.heads:
        raise UserError(f"backbone.heads={backbone.heads} does not divide backbone.width={backbone.width}.")
    if isinstance(config.data, TorchvisionData) and config.data.name not in TORCHVISION_NAMES:
        raise UserError(f"data.name={config.data.name}: {did_you_mean(config.data.name, TORCHVISION_NAMES)}")


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
            f"crops.backend=pil knows images of 1 or 3 channels, not data.channels={channels}; "
            "set crops=cpu or crops=device."
        )


def _check_trainer(config: TrainConfig) -> None:
    trainer = config.trainer
    if str(trainer.precision) in ("16-true", "bf16-true"):
        raise UserError(
            f"trainer.precision={trainer.precision} would round the teacher's small steps away; set "
            "trainer.precision=bf16-mixed."
        )
    check_devices(trainer, {"precision": PRECISIONS, "strategy": STRATEGIES, "accelerator": ACCELERATORS})
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


def _check_durations(config: TrainConfig) -> None:
    epochs = config.trainer.max_epochs
    for key in DURATIONS:
        text = get_dotted(config, key)
        if text is None:
            continue
        duration = Duration.parse(text, key=key)
        if duration.unit == "ep" and epochs not in (None, -1) and duration.amount > epochs:  # type: ignore[operator]
            raise UserError(
                f"{key}={text} is longer than the run of trainer.max_epochs={epochs}; '10%' would scale with it."
            )


def _check_callbacks(config: TrainConfig) -> None:
    knn = config.callbacks.knn
    if knn.headline_k not in knn.k:
        raise UserError(
            f"callbacks.knn.headline_k={knn.headline_k} is not one of callbacks.knn.k={format_value(knn.k)}."
        )
    check_pruning(config)
