"""`init_from`: initializes the networks of a training with the weights of another network."""

import math
from typing import cast

from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dino_lightning.checkpoints.original import Weights, check_names_and_shapes, num_heads
from dino_lightning.errors import UserError
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.models.vit import OriginalViT, resample_position_embedding


def initial_weights(network: FrozenNetwork, backbone: nn.Module, *, source: str) -> Weights:
    """The weights of `network` for `backbone`, which may be on the meta device and may have another image size.

    The position embedding is resampled once to that size, as the network would do at each use. Raises `UserError`,
    starting with `source`, for different architectures.
    """
    weights, expected = dict(network.backbone.state_dict()), backbone.state_dict()
    heads = [num_heads(each) for each in (network.backbone, backbone)]
    if None not in heads and heads[0] != heads[1]:
        raise UserError(
            f"{source} has {heads[0]} attention heads, but the configured backbone has {heads[1]}; choose the matching "
            "backbone."
        )
    if isinstance(backbone, VisionTransformer) and {"pos_embed"} <= weights.keys() & expected.keys():
        weights["pos_embed"] = _resampled(weights["pos_embed"], expected["pos_embed"], backbone)
    check_names_and_shapes(expected, weights, source=source, target="the configured backbone")
    return weights


def initialize_from(network: FrozenNetwork, *backbones: nn.Module, source: str) -> None:
    """Load the weights of `network` into each backbone; see `initial_weights`."""
    for backbone in backbones:
        # Not strict: some files have no counters of batch norms.
        backbone.load_state_dict(initial_weights(network, backbone, source=source), strict=False)


def _resampled(table_1ND: Tensor, wanted_1ND: Tensor, backbone: VisionTransformer) -> Tensor:
    if table_1ND.shape[1] == wanted_1ND.shape[1] or table_1ND.shape[2] != wanted_1ND.shape[2]:
        return table_1ND
    prefix = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
    side = math.isqrt(wanted_1ND.shape[1] - prefix)
    if isinstance(backbone, OriginalViT):
        return resample_position_embedding(table_1ND, side, side, prefix=prefix)
    return cast(Tensor, resample_abs_pos_embed(table_1ND, [side, side], num_prefix_tokens=prefix))
