"""The tokens and attention maps inside a backbone, for evaluations and pictures."""

from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dino_lightning.errors import UserError


@torch.no_grad()
def cls_attention(vit: VisionTransformer, images_B3HW: Tensor) -> Tensor:
    """Attention of the class token to each patch in the last block: (B, heads, h, w), with a sum below 1.

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
    """Whether `cls_attention` supports this network."""
    return isinstance(backbone, VisionTransformer) and backbone.cls_token is not None and backbone.dynamic_img_size


def is_vit(backbone: nn.Module) -> bool:
    """Whether this network has a class token and blocks, as the functions below need."""
    return isinstance(backbone, VisionTransformer) and backbone.cls_token is not None


def patch_size(backbone: nn.Module) -> int:
    """Side of a patch (pixels). Raises `UserError` for networks without patches."""
    embed = getattr(backbone, "patch_embed", None)
    size = getattr(embed, "patch_size", None)
    if size is None:
        raise UserError(f"checkpoint: {type(backbone).__name__} has no patches; this evaluation needs a ViT.")
    return int(size[0]) if isinstance(size, tuple | list) else int(size)


@torch.no_grad()
def last_blocks(backbone: nn.Module, images_BCHW: Tensor, *, n: int) -> list[Tensor]:
    """Tokens (B, P + N, D) after each of the last n blocks, deepest last, each through the final norm.

    Raises `UserError` if the network has no blocks, or fewer than n.
    """
    if not is_vit(backbone):
        raise UserError(f"checkpoint: {type(backbone).__name__} has no class token and blocks; this needs a ViT.")
    vit = cast(VisionTransformer, backbone)
    if n > len(vit.blocks):
        raise UserError(f"eval.n_last_blocks={n}: the network has {len(vit.blocks)} blocks.")
    x_BTD = vit.norm_pre(vit._pos_embed(vit.patch_embed(images_BCHW)))
    outputs = []
    for i, block in enumerate(vit.blocks):
        x_BTD = block(x_BTD)
        if len(vit.blocks) - i <= n:
            outputs.append(vit.norm(x_BTD))
    return outputs


@torch.no_grad()
def linear_features(backbone: nn.Module, images_BCHW: Tensor, *, n_last_blocks: int, avgpool: bool) -> Tensor:
    """The features of the linear evaluation: (B, n D), or (B, (n + 1) D) with `avgpool`.

    With `avgpool` the original stacks class tokens and mean patch token on a new last axis and flattens: for n = 1 the
    two alternate value by value. Published classifiers expect that order. Networks other than ViTs give (B, D) and
    support only n = 1 without `avgpool`.
    """
    if not is_vit(backbone):
        if n_last_blocks != 1 or avgpool:
            raise UserError(
                f"eval.n_last_blocks={n_last_blocks} eval.avgpool={str(avgpool).lower()}: "
                f"{type(backbone).__name__} has no class token; set eval.n_last_blocks=1 eval.avgpool=false."
            )
        return backbone(images_BCHW)
    blocks = last_blocks(backbone, images_BCHW, n=n_last_blocks)
    mean_patch_BD = blocks[-1][:, cast(Any, backbone).num_prefix_tokens :].mean(dim=1) if avgpool else None
    return join_tokens([block[:, 0] for block in blocks], mean_patch_BD)


def join_tokens(cls_nBD: list[Tensor], mean_patch_BD: Tensor | None) -> Tensor:
    """Class tokens of n blocks, and a mean patch token, in the order of the original: see `linear_features`."""
    cls_BnD = torch.cat(cls_nBD, dim=-1)
    if mean_patch_BD is None:
        return cls_BnD
    if len(cls_nBD) == 1:
        return torch.stack([cls_BnD, mean_patch_BD], dim=-1).flatten(1)
    # The original stacks here, too, and fails because the widths differ; the paper combines them with n = 1 only.
    return torch.cat([cls_BnD, mean_patch_BD], dim=-1)


@torch.no_grad()
def patch_tokens(backbone: nn.Module, images_BCHW: Tensor) -> Tensor:
    """The patch tokens of the last block, through the final norm: (B, h, w, D).

    For a convolutional network, its last feature map.
    """
    if is_vit(backbone):
        p, prefix = patch_size(backbone), cast(Any, backbone).num_prefix_tokens
        h, w = images_BCHW.shape[-2] // p, images_BCHW.shape[-1] // p
        return last_blocks(backbone, images_BCHW, n=1)[0][:, prefix:].unflatten(1, (h, w))
    features = cast(Any, backbone).forward_features(images_BCHW)
    if features.ndim != 4:
        raise UserError(f"checkpoint: {type(backbone).__name__} gives no map of patches; this evaluation needs a ViT.")
    return features.permute(0, 2, 3, 1)
