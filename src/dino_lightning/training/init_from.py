"""`init_from`: the network whose weights a training starts from, loaded and compared before anything is built."""

import os

import torch

from dino_lightning.checkpoints import load_network
from dino_lightning.checkpoints.init_weights import initial_weights
from dino_lightning.config import TimmConfig, TrainConfig
from dino_lightning.errors import UserError
from dino_lightning.models.backbones import build_backbone
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.runtime.console import warn


def check_initial(config: TrainConfig) -> FrozenNetwork | None:
    """The network of `init_from`, None without one. Raises `UserError` where it is not the configured backbone."""
    if config.init_from is None:
        if config.init_key is not None:
            raise UserError(f"init_key={config.init_key} says which network of init_from, and init_from is not set.")
        return None
    if isinstance(config.backbone, TimmConfig) and config.backbone.pretrained:
        raise UserError(
            f"init_from={config.init_from} and backbone.pretrained=true both give the first weights; set one of them."
        )
    try:
        network = load_network(config.init_from, key=config.init_key, seed=config.seed)
    except UserError as error:
        words = str(error).replace("checkpoint_key=", "init_key=").replace("checkpoint=", "init_from=")
        raise UserError(words) from error
    size, channels = config.crops.global_size, config.data.channels
    with torch.device("meta"):
        outline = build_backbone(config.backbone, image_size=size, channels=channels, drop_path=False)
    initial_weights(network, outline, source=f"init_from={config.init_from}")
    seen, given = (network.mean, network.std), (config.crops.mean, config.crops.std)
    if seen != given and os.environ.get("LOCAL_RANK", "0") == "0":
        warn(
            f"init_from={config.init_from} was trained on images normalized by crops.mean={network.mean} and "
            f"crops.std={network.std}; here they are {given[0]} and {given[1]}."
        )
    return network
