"""Which outputs of a network are the features of an image. B images, n last blocks, D width."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from dino_lightning.errors import UserError
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.models.tokens import is_vit, linear_features, patch_tokens


@dataclass(frozen=True)
class FeatureSpec:
    """A choice of features; the default exists for every network."""

    n_last_blocks: int = 1
    """Class tokens of this many last blocks, concatenated, deepest last."""
    avgpool: bool = False
    """Add the mean patch token of the last block, as `linear_features` does."""
    features: str = "tokens"
    """`tokens`: the class tokens, and the mean patch token with `avgpool`; `class`: as `tokens`, but of a single block
    the network's own output; `mean_patch`: only the mean of the last block's patch tokens."""
    prefix: str = field(default="eval.", compare=False)
    """Prefix of the keys in error messages."""

    @property
    def cache_key(self) -> str:
        """The name of these features in the feature cache, shared by all programs."""
        if self.features == "mean_patch":
            return "mean_patch"
        if self.features == "class" and self.n_last_blocks == 1:
            return "backbone"
        return f"linear, eval.n_last_blocks={self.n_last_blocks} eval.avgpool={str(self.avgpool).lower()}"

    def width(self, network: FrozenNetwork) -> int:
        """Number of features of an image."""
        if self.features == "mean_patch":  # a layer after the pooling, as some networks have, is not applied
            return int(cast(Any, network.backbone).num_features)
        return network.width * (self.n_last_blocks + self.avgpool)

    def exists_in(self, network: FrozenNetwork) -> bool:
        """False if the network is not a ViT and this is not the default. Raises `UserError` for too many blocks."""
        if not is_vit(network.backbone):
            return self.n_last_blocks == 1 and not self.avgpool
        blocks = len(cast(Any, network.backbone).blocks)
        if self.n_last_blocks > blocks:
            raise UserError(
                f"{self.prefix}n_last_blocks={self.n_last_blocks}: {network.name} has {blocks} blocks; expected 1 to "
                f"{blocks}."
            )
        return True

    def check(self, network: FrozenNetwork) -> None:
        """Raise `UserError` if the network does not have these features."""
        if not self.exists_in(network):
            raise UserError(
                f"{self}: {network.name} is not a ViT and has only one kind of features; set "
                f"{FeatureSpec(features=self.features, prefix=self.prefix)}."
            )

    def of(self, backbone: nn.Module) -> Callable[[Tensor], Tensor]:
        """A function from images (B, C, H, W) to features (B, D), for n blocks (B, n D)."""
        if self.features == "mean_patch":
            return lambda images_BCHW: patch_tokens(backbone, images_BCHW).mean(dim=(1, 2))
        if self.features == "class" and self.n_last_blocks == 1:
            return backbone
        return lambda images_BCHW: linear_features(
            backbone, images_BCHW, n_last_blocks=self.n_last_blocks, avgpool=self.avgpool
        )

    def __str__(self) -> str:
        blocks = f"{self.prefix}n_last_blocks={self.n_last_blocks}"
        return blocks if self.features == "class" else f"{blocks} {self.prefix}avgpool={str(self.avgpool).lower()}"


NETWORK_OUTPUT = FeatureSpec(features="class")
"""What the network itself returns for an image."""
