"""The table of backbones: which function builds `backbone=NAME`. Those of this package and of users are added alike."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from dino_lightning.config import BackboneConfig
from dino_lightning.config.registry import register_schema

BACKBONES: dict[type[BackboneConfig], Callable[..., nn.Module]] = {}
"""Configuration -> function that builds the network."""

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])


def register_backbone(name: str, config: type[Any]) -> Callable[[Builder], Builder]:
    """Decorator that makes `backbone=NAME` build the network with the decorated function.

    It is called as `build(config, image_size=…, channels=…, drop_path_rate=…)` and returns a network that maps images
    (B, C, H, W) of any size to features (B, D), with D as its attribute `num_features`. `image_size` (pixels) is the
    side of the global crops, for networks with a learned position embedding.
    """

    def register(build: Builder) -> Builder:
        register_schema("backbone", name, config)
        BACKBONES[config] = build
        return build

    return register
