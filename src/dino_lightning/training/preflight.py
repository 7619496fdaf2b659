"""TODO."""

import os

from dino_lightning.config import (
    TrainConfig,
)
from dino_lightning.config.checks.training import DURATIONS
from dino_lightning.config.dotted import get_dotted
from dino_lightning.config.duration import Duration
from dino_lightning.data.cache import cache_root
from dino_lightning.data.module import MultiCropDataModule
from dino_lightning.data.sources.base import ImageStream
from dino_lightning.errors import UserError
from dino_lightning.loggers.checks import check_logger
from dino_lightning.runtime.environment import LAUNCHERS, check_gpus, check_variables
from dino_lightning.runtime.files import check_writable


def check_environment(config: TrainConfig) -> None:
    """Everything about machine and environment that a training run can know before it opens its images."""
    check_variables()
    check_gpus(config.trainer.accelerator)
    if config.trainer.num_nodes > 1 and not any(os.environ.get(name) for name in LAUNCHERS):
        raise UserError(
            f"trainer.num_nodes={config.trainer.num_nodes}: nothing has started processes on other machines, and this "
            "one would wait for them; start it with srun or torchrun, or set trainer.num_nodes=1."
        )
    check_logger(config.logger)
    if config.data.cache == "disk":
        check_writable("data.cache_dir", cache_root(config.data))


def check_data(config: TrainConfig, data: MultiCropDataModule, *, world_size: int) -> None:
    """Everything that the images and the number of devices decide; opens the data."""
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
    per_epoch = -(-(-(-images // world_size) // batch) // config.trainer.accumulate_grad_batches)
    total = per_epoch * (config.trainer.max_epochs or 1)
    for key in DURATIONS:
        _check_fits(config, key, per_epoch, total)


def _check_fits(config: TrainConfig, key: str, steps_per_epoch: int, total_steps: int) -> None:
    text = get_dotted(config, key)
    if text is None:
        return
    steps = Duration.parse(text, key=key).steps(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    if steps > total_steps:
        raise UserError(f"{key}={text} is longer than the run of {total_steps} steps ({steps_per_epoch} per epoch).")


def check_labels(config: TrainConfig, data: MultiCropDataModule) -> None:
    """Refuse to learn from labels that are not there."""
    if not config.method.uses_labels:
        return
    if isinstance(data.sources.train, ImageStream):
        raise UserError(
            "method=supervised reads labels by index, which a stream of shards does not have; choose another method "
            "or data=folder, parquet, listing or archive."
        )
    if data.num_classes < 2:
        why = f" ({data.sources.remark})" if data.sources.remark and not data.num_classes else ""
        raise UserError(
            f"method=supervised needs labels of two classes or more, and this data has {data.num_classes}{why}; choose "
            "method=dino."
        )
