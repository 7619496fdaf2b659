"""From configuration to objects: a `match` per group, in the order of a run."""

import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.config_store import ConfigStore
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from dino_lightning.backbones import build_backbone
from dino_lightning.callbacks.collapse import CollapseAlarm
from dino_lightning.callbacks.knn import KNNCallback
from dino_lightning.callbacks.pictures import Pictures
from dino_lightning.callbacks.progress import RunProgress
from dino_lightning.callbacks.speed import Speed
from dino_lightning.checkpoints import Description
from dino_lightning.config import (
    SCHEMAS,
    BYOLConfig,
    CSVLoggerConfig,
    DINOConfig,
    MethodConfig,
    MoCoConfig,
    SupervisedConfig,
    SwAVConfig,
    TeacherConfig,
    TensorBoardLoggerConfig,
    TrainConfig,
    WandbLoggerConfig,
)
from dino_lightning.data.module import MultiCropDataModule
from dino_lightning.distributed import trains_on_cpu
from dino_lightning.errors import UserError
from dino_lightning.methods.base import Method
from dino_lightning.methods.byol import BYOL
from dino_lightning.methods.dino import DINO
from dino_lightning.methods.moco import MoCo
from dino_lightning.methods.supervised import Supervised
from dino_lightning.methods.swav import SwAV
from dino_lightning.strategy import SharedStatistics, build_strategy


def build_data(config: TrainConfig) -> MultiCropDataModule:
    """The data module; images are opened at first use."""
    bad_images = Path(config.output_dir) / "bad_images.txt"
    labels = isinstance(config.method, SupervisedConfig)
    return MultiCropDataModule(config.data, config.crops, seed=config.seed, bad_images=bad_images, labels=labels)


def build_trainer(config: TrainConfig, *, hyperparameters: dict[str, Any]) -> L.Trainer:
    """Lightning's trainer with this run's callbacks and loggers."""
    arguments = {key: value for key, value in asdict(config.trainer).items() if value is not None}
    # PyTorch shares the statistics of batch norms on GPUs only; `run` says so.
    if arguments.pop("sync_batchnorm") and not trains_on_cpu(config.trainer.accelerator):
        given = arguments.get("plugins", [])
        arguments["plugins"] = [*(given if isinstance(given, list) else [given]), SharedStatistics()]
    callbacks = build_callbacks(config) if not config.trainer.barebones else []
    loggers = build_loggers(config, hyperparameters=hyperparameters) if not config.trainer.barebones else False
    try:
        arguments["strategy"] = build_strategy(config.trainer)
        return L.Trainer(**arguments, callbacks=callbacks, logger=loggers, default_root_dir=config.output_dir)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


def build_callbacks(config: TrainConfig) -> list[Callback]:
    """Callbacks in the order in which they run: k-NN before those that show or keep its result."""
    output, trainer, speed = Path(config.output_dir), config.trainer, Speed()
    callbacks: list[Callback] = [speed]
    if config.callbacks.knn.enabled:
        callbacks.append(KNNCallback(config.callbacks.knn, seed=config.seed))
    if config.callbacks.collapse.enabled:
        callbacks.append(CollapseAlarm(config.callbacks.collapse))
    if trainer.enable_progress_bar:
        callbacks.append(RunProgress(speed))
    if config.callbacks.pictures.enabled:
        callbacks.append(Pictures(config.callbacks.pictures, folder=output / "pictures", seed=config.seed))
    if trainer.enable_checkpointing:
        callbacks += _checkpoints(config, output / "checkpoints")
    return callbacks


class KeptCheckpoint(ModelCheckpoint):
    """Checkpoints kept for good.

    A class of its own because Lightning tells callbacks apart by class and interval: at an interval of one epoch it
    would take this one for that of `last.ckpt`.
    """


def _checkpoints(config: TrainConfig, folder: Path) -> list[Callback]:
    always: dict[str, Any] = {"dirpath": folder, "auto_insert_metric_name": False, "enable_version_counter": False}
    always["save_on_train_epoch_end"] = True
    kept: list[Callback] = [ModelCheckpoint(filename="last", **always)]
    if config.callbacks.knn.enabled:
        every = config.callbacks.knn.every_n_epochs
        kept.append(
            ModelCheckpoint(filename="best_knn", monitor="knn/top1", mode="max", every_n_epochs=every, **always)
        )
    if config.callbacks.checkpoint.every_n_epochs:
        every = config.callbacks.checkpoint.every_n_epochs
        kept.append(KeptCheckpoint(filename="epoch{epoch:04d}", save_top_k=-1, every_n_epochs=every, **always))
    return kept


def build_loggers(config: TrainConfig, *, hyperparameters: dict[str, Any]) -> list[Logger]:
    """`metrics.csv`, and the configured logger beside it; `hyperparameters` is logged as it is."""
    output = Path(config.output_dir)
    loggers: list[Logger] = [_csv_logger(output, resume=config.resume)]
    match config.logger:
        case CSVLoggerConfig():
            return loggers
        case WandbLoggerConfig() as wandb:
            other: Logger = WandbLogger(
                project=wandb.project,
                name=wandb.name or output.name,
                group=wandb.group,
                tags=wandb.tags,
                mode=wandb.mode,
                save_dir=output,
            )
        case TensorBoardLoggerConfig():
            other = TensorBoardLogger(save_dir=output, name="", version="tensorboard")
        case _:
            raise TypeError(f"no logger for {type(config.logger).__name__}")
    other.log_hyperparams(hyperparameters)
    return [*loggers, other]


def _csv_logger(output: Path, *, resume: bool) -> CSVLogger:
    before = (output / "metrics.csv").read_text() if resume and (output / "metrics.csv").exists() else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the folder not being empty: it has config.yaml
        logger = CSVLogger(save_dir=output, name="", version="")
        writer = logger.experiment
    if before:
        # Lightning starts the file anew: hand it the rows of the run that goes on.
        header, *rows = (line.split(",") for line in before.splitlines())
        writer.metrics += [{key: v for key, v in zip(header, row, strict=True) if v} for row in rows]  # type: ignore[attr-defined]
    return logger


METHODS: dict[type[MethodConfig], Callable[..., Method]] = {}
"""Methods of one's own, by their configuration: `register_method`."""


def register_method(name: str, config: type[MethodConfig], method: Callable[..., Method]) -> None:
    """Make `method=NAME` known: its dataclass, and what is called with an instance of it.

    `method` gets what `build_method` gives to all: `student_backbone`, `feature_dim`, `optim`, `batch_size_per_device`,
    `step` and, where it is a `StudentTeacher`, `teacher_backbone`.
    """
    SCHEMAS["method"][name] = config
    ConfigStore.instance().store(group="method", name=name, node=config)
    METHODS[config] = method


def build_method(config: TrainConfig, *, num_classes: int = 0) -> Method:
    """The LightningModule: what is trained, and how."""
    size, channels = config.crops.global_size, config.data.channels

    def backbone(*, drop_path: bool) -> nn.Module:
        return build_backbone(config.backbone, image_size=size, channels=channels, drop_path=drop_path)

    student = backbone(drop_path=True)
    common: dict[str, Any] = {
        "student_backbone": student,
        "feature_dim": student.num_features,
        "optim": config.optim,
        "batch_size_per_device": config.data.batch_size_per_device,
        "step": config.step,
    }
    if isinstance(config.method, TeacherConfig):
        common["teacher_backbone"] = backbone(drop_path=False)
    match config.method:
        case DINOConfig() as dino:
            method: Method = DINO(dino, **common)
        case BYOLConfig() as byol:
            method = BYOL(byol, **common)
        case MoCoConfig() as moco:
            method = MoCo(moco, **common)
        case SwAVConfig() as swav:
            method = SwAV(swav, **common)
        case SupervisedConfig() as supervised:
            method = Supervised(supervised, num_classes=num_classes, **common)
        case other if type(other) in METHODS:
            method = METHODS[type(other)](other, **common)
        case other:
            raise TypeError(f"no method for {type(other).__name__}")
    method.description = Description(
        config.backbone,
        image_size=size,
        mean=config.crops.mean,
        std=config.crops.std,
        resize=config.crops.eval_resize,
        size=config.crops.eval_size,
    ).plain()
    return method
