"""Backbones: images (B, 3, H, W) -> features (B, D), at any resolution.

A backbone is a timm network without classifier; `num_features` is D.
"""

from typing import Any, cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dino_lightning.config import BackboneConfig, TimmConfig, ViTConfig
from dino_lightning.errors import UserError, nearest
from dino_lightning.models.vit import OriginalViT


@torch.no_grad()
def cls_attention(vit: VisionTransformer, images_B3HW: Tensor) -> Tensor:
    """How much the class token attends to each patch in the last block: (B, heads, h, w), summing to less than 1.

    This is what the paper's figure 1 shows.
    """
    patches = vit.patch_embed(images_B3HW)
    B, h, w, _ = patches.shape
    x_BND = vit.norm_pre(vit._pos_embed(patches))
    *before, last = vit.blocks
    for block in before:
        x_BND = block(x_BND)
    attention, norm = cast(Any, last.attn), cast(nn.Module, last.norm1)
    qkv = attention.qkv(norm(x_BND)).reshape(B, x_BND.shape[1], 3, attention.num_heads, -1)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    scores_BhN = (q[:, :, :1] @ k.transpose(-2, -1)).squeeze(2) * attention.scale
    return scores_BhN.softmax(dim=-1)[:, :, vit.num_prefix_tokens :].reshape(B, -1, h, w)


def has_attention(backbone: nn.Module) -> bool:
    """Whether `cls_attention` can look into this network."""
    return isinstance(backbone, VisionTransformer) and backbone.cls_token is not None and backbone.dynamic_img_size


def build_backbone(config: BackboneConfig, *, image_size: int, drop_path: bool, channels: int = 3) -> nn.Module:
    """The configured network; `image_size` (pixels) sets the grid of a learnt position embedding."""
    options: dict[str, Any] = {"drop_path_rate": config.drop_path_rate if drop_path else 0.0, "channels": channels}
    match config:
        case ViTConfig():
            return OriginalViT(config, image_size=image_size, **options)
        case TimmConfig():
            return _timm_network(config, image_size=image_size, **options)
        case _:
            raise TypeError(f"no backbone for {type(config).__name__}")


def _timm_network(config: TimmConfig, *, image_size: int, drop_path_rate: float, channels: int) -> nn.Module:
    check_timm_name(config.name)
    arguments: dict[str, Any] = {"num_classes": 0, **_unusual(channels), **config.arguments}
    if drop_path_rate:
        arguments["drop_path_rate"] = drop_path_rate
    if config.patch_size is not None:
        arguments["patch_size"] = config.patch_size
    # Networks with a position table want the image size; those that can vary it must be told to. timm has no list of
    # which take what, and a constructor refuses what it does not know before it loads any weights.
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


def check_timm_name(name: str) -> None:
    """Refuse a name that timm does not know."""
    if not timm.is_model(name):
        raise UserError(f"backbone.name={name} is not a network of timm {timm.__version__}; "
                        f"{nearest(name, timm.list_models())}")  # fmt: skip


def _unusual(channels: int) -> dict[str, Any]:
    """timm's argument for images that are not RGB."""
    return {} if channels == 3 else {"in_chans": channels}


def timm_recipes(config: BackboneConfig, *, image_size: int, channels: int = 3) -> list[dict[str, Any]]:
    """Keyword arguments of `timm.create_model`, likeliest first, one of which builds the network of this config."""
    match config:
        case ViTConfig():
            registers = {"reg_tokens": config.registers, "no_embed_class": True} if config.registers else {}
            sizes = {(192, 12, 3): "tiny", (384, 12, 6): "small", (768, 12, 12): "base", (1024, 24, 16): "large"}
            size = sizes.get((config.width, config.depth, config.heads))
            name = f"vit_{size}_patch{config.patch_size}_{image_size}"
            if size and timm.is_model(name):
                return [{"model_name": name, "num_classes": 0, **registers, **_unusual(channels)}]
            shape = {"embed_dim": config.width, "depth": config.depth, "num_heads": config.heads}
            shape |= {"img_size": image_size, "patch_size": config.patch_size, **registers}
            return [{"model_name": "vit_tiny_patch16_224", "num_classes": 0, **shape, **_unusual(channels)}]
        case TimmConfig():
            patch = {} if config.patch_size is None else {"patch_size": config.patch_size}
            named = {"model_name": config.name, "num_classes": 0, **patch, **_unusual(channels), **config.arguments}
            return [{**named, "img_size": image_size}, named]
        case _:
            raise TypeError(f"no recipe for {type(config).__name__}")
