"""Backbones: images (B, 3, H, W) -> features (B, D), at any resolution.

A backbone is a timm network without classifier; `num_features` is D.
"""

from typing import Any

import timm
from torch import nn

from dino_lightning.config import BackboneConfig, TimmConfig, ViTConfig
from dino_lightning.config.constraints import check_timm_name
from dino_lightning.errors import UserError
from dino_lightning.models.registry import BACKBONES, register_backbone
from dino_lightning.models.vit import OriginalViT


def build_backbone(config: BackboneConfig, *, image_size: int, drop_path: bool, channels: int = 3) -> nn.Module:
    """The configured network; `image_size` (pixels) sets the grid of a learned position embedding."""
    rate = config.drop_path_rate if drop_path else 0.0
    return BACKBONES[type(config)](config, image_size=image_size, channels=channels, drop_path_rate=rate)


register_backbone("vit_small", ViTConfig)(OriginalViT)


@register_backbone("timm", TimmConfig)
def timm_network(config: TimmConfig, *, image_size: int, channels: int, drop_path_rate: float) -> nn.Module:
    """A network of timm by its name."""
    check_timm_name(config.name)
    arguments: dict[str, Any] = {"num_classes": 0, **_channels_argument(channels), **config.arguments}
    if drop_path_rate:
        arguments["drop_path_rate"] = drop_path_rate
    if config.patch_size is not None:
        arguments["patch_size"] = config.patch_size
    # Networks with a position table need the image size, and an option to vary it. timm does not list which network
    # takes which argument, but a constructor raises for unknown ones before it loads any weights.
    refusal: TypeError | None = None
    for extra in ({"img_size": image_size, "dynamic_img_size": True}, {"img_size": image_size}, {}):
        try:
            return timm.create_model(config.name, pretrained=config.pretrained, **{**extra, **arguments})
        except TypeError as error:
            refusal = error
    raise UserError(
        f"backbone.name={config.name} does not take one of {arguments}: {refusal}. Set backbone.patch_size=null and "
        "backbone.drop_path_rate=0 for networks without patches or stochastic depth."
    )


def _channels_argument(channels: int) -> dict[str, Any]:
    """timm's argument for images that are not RGB."""
    return {} if channels == 3 else {"in_chans": channels}


def timm_recipes(config: BackboneConfig, *, image_size: int, channels: int = 3) -> list[dict[str, Any]]:
    """Keyword arguments of `timm.create_model`, most likely first, one of which builds the network of this config.

    None for a user's own backbone.
    """
    match config:
        case ViTConfig():
            registers = {"reg_tokens": config.registers, "no_embed_class": True} if config.registers else {}
            sizes = {(192, 12, 3): "tiny", (384, 12, 6): "small", (768, 12, 12): "base", (1024, 24, 16): "large"}
            size = sizes.get((config.width, config.depth, config.heads))
            name = f"vit_{size}_patch{config.patch_size}_{image_size}"
            if size and timm.is_model(name):
                return [{"model_name": name, "num_classes": 0, **registers, **_channels_argument(channels)}]
            shape = {"embed_dim": config.width, "depth": config.depth, "num_heads": config.heads}
            shape |= {"img_size": image_size, "patch_size": config.patch_size, **registers}
            return [{"model_name": "vit_tiny_patch16_224", "num_classes": 0, **shape, **_channels_argument(channels)}]
        case TimmConfig():
            given = {**_channels_argument(channels), **config.arguments}
            patch = {} if config.patch_size is None else {"patch_size": config.patch_size}
            named = {"model_name": config.name, "num_classes": 0, **patch, **given}
            return [{**named, "img_size": image_size}, named]
        case _:
            return []
