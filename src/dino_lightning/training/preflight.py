"""All checks of a run, in the order in which they happen. Each raises `UserError` about one key, variable or file.

| when | function | what |
|---|---|---|
| first | `typed_config` | keys that exist, values in their range |
| then | `check_combinations` | settings that do not fit each other; an output folder with, or without, a run |
| before any image is opened | `check_settings` | both, environment, checkpoint to resume from, `init_from` |
| before the first step | `check_built` | devices, total batch, port, images and labels, disk, memory, open files |
"""

import os
from math import ceil
from pathlib import Path
from typing import Any, cast

import lightning as L
from omegaconf import DictConfig, OmegaConf

from dino_lightning.checkpoints import load_network
from dino_lightning.checkpoints.init_weights import initial_weights
from dino_lightning.config import TimmConfig, TrainConfig
from dino_lightning.config.checks.training import check_config, duration_keys
from dino_lightning.config.constraints import check_keys, check_values
from dino_lightning.config.duration import Duration
from dino_lightning.data.cache import cache_root
from dino_lightning.data.module import MultiCropDataModule
from dino_lightning.data.sources.base import ImageStream
from dino_lightning.errors import UserError
from dino_lightning.loggers.checks import check_logger
from dino_lightning.methods.base import Method
from dino_lightning.methods.flops import meta_network
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.runtime.console import warn
from dino_lightning.runtime.environment import LAUNCHERS, check_gpus, check_port, check_variables
from dino_lightning.runtime.files import check_writable
from dino_lightning.runtime.ranks import is_first_process
from dino_lightning.training.resources import check_disk, check_open_files, check_shared_memory
from dino_lightning.training.resume import (
    ResumeCheckpoint,
    check_output_dir,
    check_same_run,
    check_total_batch,
    find_checkpoint,
)


def typed_config(composed: DictConfig) -> TrainConfig:
    """The composed configuration as dataclasses, with known keys only and each value in its range."""
    check_keys(composed)
    config = cast(TrainConfig, OmegaConf.to_object(composed))
    check_values(config)
    return config


def check_combinations(config: TrainConfig) -> None:
    """What the configuration and the output folder alone can tell."""
    check_config(config)
    check_output_dir(config)


def check_settings(config: TrainConfig, composed: DictConfig) -> tuple[ResumeCheckpoint | None, FrozenNetwork | None]:
    """All checks before any image is opened; returns the checkpoint to resume from, else the network of `init_from`."""
    check_combinations(config)
    check_environment(config)
    checkpoint = find_checkpoint(config)
    if checkpoint is None:
        return None, load_init_network(config)
    settings = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True, enum_to_str=True))
    check_same_run(settings, Path(config.output_dir))
    return checkpoint, None


def check_built(
    config: TrainConfig,
    data: MultiCropDataModule,
    trainer: L.Trainer,
    method: Method,
    *,
    checkpoint: ResumeCheckpoint | None = None,
    concurrent_runs: int | None = None,
) -> None:
    """All checks that need the data, the trainer or the network; opens the data."""
    # Lightning starts the processes of a run with its own command line, which joblib's workers do not have.
    if concurrent_runs is not None and trainer.num_devices > 1:
        raise UserError(
            f"trainer.devices={config.trainer.devices}: joblib starts runs with one device each; set "
            "trainer.devices=1, or choose another launcher."
        )
    if checkpoint is not None:
        check_total_batch(config, ranks_before=checkpoint.ranks, ranks=trainer.world_size)
    check_port(trainer.strategy, world_size=trainer.world_size)
    check_data(config, data, world_size=trainer.world_size)
    if not trainer.is_global_zero:
        return
    if config.trainer.enable_checkpointing and not config.trainer.barebones:
        check_disk(config, method)
    if config.data.num_workers:
        check_shared_memory(config, processes=trainer.num_devices * (concurrent_runs or 1))
        check_open_files(config)


def check_environment(config: TrainConfig) -> None:
    """The machine and its environment variables."""
    check_variables()
    check_gpus(config.trainer.accelerator)
    if config.trainer.num_nodes > 1 and not any(os.environ.get(name) for name in LAUNCHERS):
        raise UserError(
            f"trainer.num_nodes={config.trainer.num_nodes}: no process was started on the other machines, so this one "
            "would wait for them; start it with srun or torchrun, or set trainer.num_nodes=1."
        )
    check_logger(config.logger)
    if config.data.cache == "disk":
        check_writable("data.cache_dir", cache_root(config.data))


def check_data(config: TrainConfig, data: MultiCropDataModule, *, world_size: int) -> None:
    """Number of images, labels, a sample of the images, and durations that the number of steps decides."""
    if config.callbacks.knn.enabled and not data.labeled:
        raise UserError(
            "callbacks.knn.enabled=true: k-NN evaluation needs labeled training and validation images, and this data "
            "has none; add callbacks.knn.enabled=false."
        )
    check_labels(config, data)
    images, batch = data.num_images, config.data.batch_size_per_device
    if images < batch * world_size:
        raise UserError(
            f"data.batch_size_per_device={batch} on {world_size} device(s) is larger than the {images} training "
            f"images; set it to at most {max(1, images // world_size)}."
        )
    data.check_some_images()
    if config.trainer.max_epochs in (None, -1):
        return
    micro_batches = ceil(ceil(images / world_size) / batch)
    steps_per_epoch = ceil(micro_batches / config.trainer.accumulate_grad_batches)
    total = steps_per_epoch * (config.trainer.max_epochs or 1)
    for key, text in duration_keys(config).items():
        if Duration.parse(text, key=key).steps(steps_per_epoch=steps_per_epoch, total_steps=total) > total:
            raise UserError(f"{key}={text} is longer than the run of {total} steps ({steps_per_epoch} per epoch).")


def check_labels(config: TrainConfig, data: MultiCropDataModule) -> None:
    """Supervised learning needs labels of at least two classes."""
    if not config.method.uses_labels:
        return
    if isinstance(data.sources.train, ImageStream):
        raise UserError(
            "method=supervised reads labels by index, which streams do not support; choose another method, or "
            "data=folder, parquet, listing or archive."
        )
    if data.num_classes < 2:
        reason = f" ({data.sources.remark})" if data.sources.remark and not data.num_classes else ""
        raise UserError(
            f"method=supervised needs labels of at least two classes, but this data has {data.num_classes}{reason}; "
            "choose method=dino."
        )


def load_init_network(config: TrainConfig) -> FrozenNetwork | None:
    """The network of `init_from`, or None without one. Raises `UserError` if it is not the configured backbone."""
    if config.init_from is None:
        if config.init_key is not None:
            raise UserError(f"init_key={config.init_key} selects a network of init_from, but init_from is not set.")
        return None
    if isinstance(config.backbone, TimmConfig) and config.backbone.pretrained:
        raise UserError(
            f"init_from={config.init_from} and backbone.pretrained=true both set the initial weights; use one of them."
        )
    try:
        network = load_network(config.init_from, key=config.init_key, seed=config.seed)
    except UserError as error:
        message = str(error).replace("checkpoint_key=", "init_key=").replace("checkpoint=", "init_from=")
        raise UserError(message) from error
    crops = config.crops
    backbone = meta_network(config.backbone, image_size=crops.global_size, channels=config.data.channels)
    initial_weights(network, backbone, source=f"init_from={config.init_from}")
    if (network.mean, network.std) != (crops.mean, crops.std) and is_first_process():
        warn(
            f"init_from={config.init_from} was trained on images normalized by crops.mean={network.mean} and "
            f"crops.std={network.std}, but this run uses {crops.mean} and {crops.std}."
        )
    return network
