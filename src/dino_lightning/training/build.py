"""Builds the objects of a run from its configuration: data, trainer with callbacks and loggers, method."""

from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dino_lightning.checkpoints import Description
from dino_lightning.checkpoints.init_weights import initialize_from
from dino_lightning.checkpoints.run_checkpoint import AsyncCheckpointIO, SafeCheckpointIO
from dino_lightning.config import (
    CSVLoggerConfig,
    TeacherConfig,
    TensorBoardLoggerConfig,
    TrainConfig,
    WandbLoggerConfig,
)
from dino_lightning.config.serialization import to_dict
from dino_lightning.data.module import MultiCropDataModule
from dino_lightning.errors import UserError
from dino_lightning.loggers.csv import MetricsCSVLogger
from dino_lightning.loggers.wandb import sweep_name, wandb_logger, wandb_run_id
from dino_lightning.methods.base import Method
from dino_lightning.methods.flops import step_flops
from dino_lightning.methods.parts import MethodParts
from dino_lightning.methods.registry import create_method
from dino_lightning.models.backbones import build_backbone
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.runtime.devices import trains_on_cpu
from dino_lightning.runtime.provenance import environment
from dino_lightning.training.callbacks.checkpointing import Checkpointing
from dino_lightning.training.callbacks.collapse_alarm import CollapseAlarm
from dino_lightning.training.callbacks.knn import KNNCallback
from dino_lightning.training.callbacks.nonfinite import NonfiniteSteps
from dino_lightning.training.callbacks.norms import Norms
from dino_lightning.training.callbacks.pictures import PictureSheets
from dino_lightning.training.callbacks.preemption import PreemptionHandler
from dino_lightning.training.callbacks.progress import RunProgress
from dino_lightning.training.callbacks.pruning import Pruning
from dino_lightning.training.callbacks.rank_consistency import RankConsistencyCheck
from dino_lightning.training.callbacks.rank_states import RankStates
from dino_lightning.training.callbacks.throughput import Throughput
from dino_lightning.training.resume import ResumeCheckpoint
from dino_lightning.training.strategy import SharedStatistics, build_strategy, cluster_plugins


def build(
    config: TrainConfig,
    composed: DictConfig,
    *,
    checkpoint: ResumeCheckpoint | None = None,
    init_network: FrozenNetwork | None = None,
) -> tuple[MultiCropDataModule, L.Trainer, Method]:
    """Everything that a run needs; `composed`, the same configuration, is logged as its hyperparameters."""
    torch.set_float32_matmul_precision(config.compute.matmul_precision)
    data = build_data(config)
    settings = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True, enum_to_str=True))
    step = None if checkpoint is None else checkpoint.step
    trainer = build_trainer(config, hyperparameters={**settings, "environment": environment()}, resume_step=step)
    classes = max(data.num_classes, 1)  # `preflight.check_built` refuses to train a classifier without labels
    return data, trainer, build_method(config, num_classes=classes, init_network=init_network)


def build_data(config: TrainConfig) -> MultiCropDataModule:
    """The data module; images are opened at first use."""
    bad_images = Path(config.output_dir) / "bad_images.txt"
    labels = config.method.uses_labels
    return MultiCropDataModule(config.data, config.crops, seed=config.seed, bad_images=bad_images, labels=labels)


def build_trainer(config: TrainConfig, *, hyperparameters: dict[str, Any], resume_step: int | None = None) -> L.Trainer:
    """Lightning's trainer with this run's callbacks and loggers.

    `resume_step` is the step of the checkpoint that the run resumes from, None for a new run.
    """
    arguments = {key: value for key, value in asdict(config.trainer).items() if value is not None}
    plugins = arguments.get("plugins", [])
    plugins = list(plugins) if isinstance(plugins, list) else [plugins]
    # PyTorch synchronizes batch norms on GPUs only; `summary.announce` says so.
    if arguments.pop("sync_batchnorm") and not trains_on_cpu(config.trainer.accelerator):
        plugins.append(SharedStatistics())
    checkpoint = config.callbacks.checkpoint
    io = (AsyncCheckpointIO if checkpoint.asynchronous else SafeCheckpointIO)(keep_last=checkpoint.keep_last)
    arguments["plugins"] = [*plugins, io, *cluster_plugins()]
    callbacks: list[Callback] = [RankConsistencyCheck(config)]
    loggers: list[Logger] = []
    if not config.trainer.barebones:
        callbacks += build_callbacks(config, io)
        loggers = build_loggers(config, hyperparameters=hyperparameters, resume_step=resume_step)
    try:
        timeout = timedelta(seconds=config.collective_timeout_s)
        arguments["strategy"] = build_strategy(config.trainer, timeout=timeout)
        return L.Trainer(**arguments, callbacks=callbacks, logger=loggers, default_root_dir=config.output_dir)
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


def build_callbacks(config: TrainConfig, io: SafeCheckpointIO) -> list[Callback]:
    """Callbacks in the order in which they run: k-NN before those that use its result; `io` writes checkpoints."""
    output, trainer, preemption = Path(config.output_dir), config.trainer, PreemptionHandler()
    flops = partial(step_flops, backbone=config.backbone, crops=config.crops, channels=config.data.channels)
    throughput = Throughput(flops_per_image=flops)
    callbacks: list[Callback] = [preemption, throughput, Norms()]
    knn = KNNCallback(config.callbacks.knn, seed=config.seed) if config.callbacks.knn.enabled else None
    if knn is not None:
        callbacks.append(knn)
        if config.callbacks.pruning.enabled:
            callbacks.append(Pruning(config.callbacks.pruning, folder=output, knn=knn))
    if config.callbacks.collapse.enabled:
        callbacks.append(CollapseAlarm(config.callbacks.collapse))
    callbacks.append(
        NonfiniteSteps(
            config.callbacks.nonfinite,
            folder=output / "nonfinite",
            checkpoints=output / "checkpoints",
            configuration=to_dict(config),
            seed=config.seed,
            precision=str(trainer.precision),
        )
    )
    if trainer.enable_progress_bar:
        callbacks.append(RunProgress(throughput))
    if config.callbacks.pictures.enabled:
        callbacks.append(PictureSheets(config.callbacks.pictures, folder=output / "pictures", seed=config.seed))
    if trainer.enable_checkpointing:
        checkpointing = Checkpointing(
            config.callbacks.checkpoint, folder=output / "checkpoints", io=io, preemption=preemption, knn=knn
        )
        callbacks += [RankStates(), checkpointing]
        if knn is not None:
            knn.should_interrupt = preemption.stop_requested_anywhere
    return callbacks


def build_loggers(
    config: TrainConfig, *, hyperparameters: dict[str, Any], resume_step: int | None = None
) -> list[Logger]:
    """`metrics.csv` and the configured logger, which also logs `hyperparameters`."""
    output = Path(config.output_dir)
    loggers: list[Logger] = [MetricsCSVLogger(output, before_step=resume_step)]
    match config.logger:
        case CSVLoggerConfig():
            return loggers
        case WandbLoggerConfig() as wandb:
            sweep = sweep_name()
            name = output.name if sweep is None else f"{sweep}/{output.name}"
            run_id = wandb_run_id(output, resume=resume_step is not None)
            logger: Logger = wandb_logger(wandb, folder=output, run_id=run_id, name=name, group=sweep, job_type="train")
            by_k = [f"{top}_k{k}" for k in config.callbacks.knn.k for top in ("top1", "top5")]
            logger.start(best=[f"knn/{metric}" for metric in ("top1", "top5", *by_k)])
        case TensorBoardLoggerConfig():
            logger = TensorBoardLogger(save_dir=output, name="", version="tensorboard")
        case _:
            raise TypeError(f"no logger for {type(config.logger).__name__}")
    logger.log_hyperparams(hyperparameters)
    return [*loggers, logger]


def build_method(config: TrainConfig, *, num_classes: int = 0, init_network: FrozenNetwork | None = None) -> Method:
    """The LightningModule; its backbones start from the weights of `init_network` if there is one."""
    size, channels = config.crops.global_size, config.data.channels

    def backbone(*, drop_path: bool) -> nn.Module:
        return build_backbone(config.backbone, image_size=size, channels=channels, drop_path=drop_path)

    student = backbone(drop_path=True)
    parts = MethodParts(
        student,
        feature_dim=cast(int, student.num_features),
        optim=config.optim,
        batch_size_per_device=config.data.batch_size_per_device,
        compute=config.compute,
        teacher_backbone=backbone(drop_path=False) if isinstance(config.method, TeacherConfig) else None,
        num_classes=num_classes,
    )
    if init_network is not None:
        backbones = [student] if parts.teacher_backbone is None else [student, parts.teacher_backbone]
        initialize_from(init_network, *backbones, source=f"init_from={config.init_from}")
    method = create_method(config.method, parts)
    method.description = Description.of_run(config).to_dict()
    return method
