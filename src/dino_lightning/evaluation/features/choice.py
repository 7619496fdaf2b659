"""What stands for an image: `features` and `n_last_blocks`.

B images, n last blocks, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from dino_lightning.errors import UserError, did_you_mean
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.models.tokens import is_vit, linear_features, patch_tokens

FEATURES = ("class", "mean_patch")


@dataclass(frozen=True)
class FeatureKind:
    """A choice of features."""

    features: str = "class"
    """`class`: a ViT's class token, what other networks pool; `mean_patch`: the mean of the last patch tokens."""
    n_last_blocks: int = 1
    """Class tokens of this many last blocks, one after another."""

    @property
    def name(self) -> str:
        """For the feature cache; features that evaluations keep have the name that they give them."""
        if self.features == "mean_patch":
            return "mean_patch"
        return "backbone" if self.n_last_blocks == 1 else f"class tokens of {self.n_last_blocks} blocks"

    def check(self) -> None:
        """Raise `UserError` for words and numbers that are no choice, whatever the network."""
        if self.features not in FEATURES:
            raise UserError(f"features={self.features}: {did_you_mean(self.features, FEATURES)}")
        if self.n_last_blocks < 1:
            raise UserError(f"n_last_blocks={self.n_last_blocks}: expected at least 1.")
        if self.n_last_blocks > 1 and self.features != "class":
            raise UserError(
                f"n_last_blocks={self.n_last_blocks} is for features=class; with features={self.features} "
                "leave it at 1."
            )

    def check_network(self, network: FrozenNetwork) -> None:
        """Raise `UserError` where the network has no such features."""
        self.check()
        if self.n_last_blocks == 1:
            return
        if not is_vit(network.backbone):
            raise UserError(
                f"n_last_blocks={self.n_last_blocks}: {network.name} has no class token; set n_last_blocks=1."
            )
        blocks = len(network.backbone.blocks)  # type: ignore[arg-type]
        if self.n_last_blocks > blocks:
            raise UserError(f"n_last_blocks={self.n_last_blocks}: {network.name} has {blocks} blocks.")

    def of(self, backbone: nn.Module) -> Callable[[Tensor], Tensor]:
        """Images (B, C, H, W) -> features (B, D), of n blocks (B, n D)."""
        if self.features == "mean_patch":
            return lambda images_BCHW: patch_tokens(backbone, images_BCHW).mean(dim=(1, 2))
        if self.n_last_blocks == 1:
            return backbone
        return lambda images_BCHW: linear_features(
            backbone, images_BCHW, n_last_blocks=self.n_last_blocks, avgpool=False
        )


@dataclass(frozen=True)
class FeatureChoice:
    """Which tokens of a network make its features; see `networks.linear_features`."""

    n_last_blocks: int
    avgpool: bool

    def width(self, network: FrozenNetwork) -> int:
        """Features of an image."""
        return network.width * (self.n_last_blocks + self.avgpool)

    def possible(self, network: FrozenNetwork) -> bool:
        """Networks other than ViTs have one kind of features. Raises `UserError` for more blocks than there are."""
        if not is_vit(network.backbone):
            return self == FeatureChoice(1, avgpool=False)
        blocks = len(cast(Any, network.backbone).blocks)
        if self.n_last_blocks > blocks:
            raise UserError(
                f"eval.n_last_blocks={self.n_last_blocks}: {network.name} has {blocks} blocks; give 1 to {blocks}."
            )
        return True

    def check(self, network: FrozenNetwork) -> None:
        """Raises `UserError` where the network has no such features."""
        if not self.possible(network):
            raise UserError(
                f"{self}: {network.name} is no ViT and has one kind of features; set eval.n_last_blocks=1 "
                "eval.avgpool=false."
            )

    def of(self, backbone: nn.Module) -> Callable[[Tensor], Tensor]:
        """Images (B, C, H, W) -> features (B, D)."""
        return lambda images: linear_features(backbone, images, n_last_blocks=self.n_last_blocks, avgpool=self.avgpool)

    def __str__(self) -> str:
        return f"eval.n_last_blocks={self.n_last_blocks} eval.avgpool={str(self.avgpool).lower()}"
