"""From configuration to objects: a `match` per group, in the order of a run."""

import hashlib
import time
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
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
from dino_lightning.loggers.wandb import RUN_ID_FILE, sweep_name, wandb_logger
from dino_lightning.methods.base import Method
from dino_lightning.methods.flops import step_flops
from dino_lightning.methods.parts import MethodParts
from dino_lightning.methods.registry import create_method
from dino_lightning.models.backbones import build_backbone
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.runtime.devices import trains_on_cpu
from dino_lightning.runtime.files import write_atomically
from dino_lightning.training.callbacks.checkpointing import Checkpointing
from dino_lightning.training.callbacks.collapse_alarm import CollapseAlarm
from dino_lightning.training.callbacks.knn import KNNCallback
from dino_lightning.training.callbacks.nonfinite import NonfiniteSteps
from dino_lightning.training.callbacks.norms import Norms
from dino_lightning.training.callbacks.pictures import Pictures
from dino_lightning.training.callbacks.preemption import PreemptionHandler
from dino_lightning.training.callbacks.progress import RunProgress
from dino_lightning.training.callbacks.pruning import Pruning
from dino_lightning.training.callbacks.rank_consistency import RankConsistencyCheck
from dino_lightning.training.callbacks.rank_states import RankStates
from dino_lightning.training.callbacks.throughput import Throughput
from dino_lightning.training.strategy import SharedStatistics, build_strategy, cluster_plugins


def build_data(config: TrainConfig) -> MultiCropDataModule:
    """The data module; images are opened at first use."""
    bad_images = Path(config.output_dir) / "bad_images.txt"
    labels = config.method.uses_labels
    return MultiCropDataModule(config.data, config.crops, seed=config.seed, bad_images=bad_images, labels=labels)


def build_trainer(config: TrainConfig, *, hyperparameters: dict[str, Any], before_step: int | None = None) -> L.Trainer:
    """Lightning's trainer with this run's callbacks and loggers.

    `before_step` is the step of the checkpoint that the run goes on from; None where it starts.
    """
    arguments = {key: value for key, value in asdict(config.trainer).items() if value is not None}
    given = arguments.get("plugins", [])
    plugins = list(given) if isinstance(given, list) else [given]
    # PyTorch shares the statistics of batch norms on GPUs only; `run` says so.
    if arguments.pop("sync_batchnorm") and not trains_on_cpu(config.trainer.accelerator):
        plugins.append(SharedStatistics())
    kind = AsyncCheckpointIO if config.callbacks.checkpoint.asynchronous else SafeCheckpointIO
    io = kind(keep_last=config.callbacks.checkpoint.keep_last)
    arguments["plugins"] = [*plugins, io, *cluster_plugins()]
    callbacks: list[Callback] = [RankConsistencyCheck(config)]
    loggers: list[Logger] = []
    if not config.trainer.barebones:
        callbacks += build_callbacks(config, io)
        loggers = build_loggers(config, hyperparameters=hyperparameters, before_step=before_step)
    try:
        timeout = timedelta(seconds=config.collective_timeout_s)
        arguments["strategy"] = build_strategy(config.trainer, timeout=timeout)
        return L.Trainer(**arguments, callbacks=callbacks, logger=loggers, default_root_dir=config.output_dir)
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


def build_callbacks(config: TrainConfig, io: SafeCheckpointIO) -> list[Callback]:
    """Callbacks in the order in which they run: k-NN before those that show or keep its result; `io` writes files."""
    output, trainer, signals = Path(config.output_dir), config.trainer, PreemptionHandler()
    count = partial(step_flops, backbone=config.backbone, crops=config.crops, channels=config.data.channels)
    speed = Throughput(flops_per_image=count)
    callbacks: list[Callback] = [signals, speed, Norms()]
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
        callbacks.append(RunProgress(speed))
    if config.callbacks.pictures.enabled:
        callbacks.append(Pictures(config.callbacks.pictures, folder=output / "pictures", seed=config.seed))
    if trainer.enable_checkpointing:
        folder = output / "checkpoints"
        saving = Checkpointing(config.callbacks.checkpoint, folder=folder, io=io, signals=signals, knn=knn)
        callbacks += [RankStates(), saving]
        if knn is not None:
            knn.break_off = signals.asked_anywhere
    return callbacks


def build_loggers(
    config: TrainConfig, *, hyperparameters: dict[str, Any], before_step: int | None = None
) -> list[Logger]:
    """`metrics.csv`, and the configured logger beside it; `hyperparameters` is logged as it is."""
    output = Path(config.output_dir)
    loggers: list[Logger] = [MetricsCSVLogger(output, before_step=before_step)]
    match config.logger:
        case CSVLoggerConfig():
            return loggers
        case WandbLoggerConfig() as wandb:
            sweep = sweep_name()
            name = output.name if sweep is None else f"{sweep}/{output.name}"
            run_id = wandb_run_id(output, resume=before_step is not None)
            other: Logger = wandb_logger(wandb, folder=output, run_id=run_id, name=name, group=sweep, job_type="train")
            other.start(best=[f"knn/{each}" for each in ("top1", "top5", *_top_k(config.callbacks.knn.k))])
        case TensorBoardLoggerConfig():
            other = TensorBoardLogger(save_dir=output, name="", version="tensorboard")
        case _:
            raise TypeError(f"no logger for {type(config.logger).__name__}")
    other.log_hyperparams(hyperparameters)
    return [*loggers, other]


def _top_k(numbers: list[int]) -> list[str]:
    return [f"{top}_k{k}" for k in numbers for top in ("top1", "top5")]


def wandb_run_id(output: Path, *, resume: bool) -> str:
    """The run's id at W&B, kept in the output folder: a run that goes on is the same one there."""
    file = output / RUN_ID_FILE
    if resume and file.exists():
        return file.read_text().strip()
    # Of the folder: all ranks agree on it without a word, and the first that comes here writes it.
    first = rank_zero_only.rank == 0  # pyright: ignore[reportFunctionMemberAccess]
    started = str(time.time_ns()) if first else ""
    run_id = hashlib.sha256(f"{output.absolute()} {started}".encode()).hexdigest()[:12]
    if first:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(file, run_id + "\n")
    return run_id


def build_method(config: TrainConfig, *, num_classes: int = 0, initial: FrozenNetwork | None = None) -> Method:
    """The LightningModule: what is trained, and how; its backbones start from the weights of `initial`, if given."""
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
    if initial is not None:
        backbones = [student] if parts.teacher_backbone is None else [student, parts.teacher_backbone]
        initialize_from(initial, *backbones, source=f"init_from={config.init_from}")
    method = create_method(config.method, parts)
    method.description = Description(
        config.backbone,
        image_size=size,
        mean=config.crops.mean,
        std=config.crops.std,
        resize=config.crops.eval_resize,
        size=config.crops.eval_size,
    ).to_dict()
    return method
