"""`init_from`: the network whose weights a training starts from, loaded and compared before anything is built."""

import torch

from dino_lightning.checkpoints import load_network
from dino_lightning.checkpoints.init_weights import initial_weights
from dino_lightning.config import TimmConfig, TrainConfig
from dino_lightning.errors import UserError
from dino_lightning.models.backbones import build_backbone
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.runtime.console import warn
from dino_lightning.runtime.ranks import is_first_process


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
    with torch.device("meta"):
        backbone = build_backbone(
            config.backbone, image_size=crops.global_size, channels=config.data.channels, drop_path=False
        )
    initial_weights(network, backbone, source=f"init_from={config.init_from}")
    if (network.mean, network.std) != (crops.mean, crops.std) and is_first_process():
        warn(
            f"init_from={config.init_from} was trained on images normalized by crops.mean={network.mean} and "
            f"crops.std={network.std}, but this run uses {crops.mean} and {crops.std}."
        )
    return network
