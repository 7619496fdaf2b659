"""A frozen backbone with its preprocessing: the input of every evaluation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from dino_lightning.errors import UserError
from dino_lightning.models.tokens import is_vit, patch_size


@dataclass(frozen=True)
class FrozenNetwork:
    """A frozen backbone and the preprocessing that its weights expect."""

    backbone: nn.Module
    """Images (B, C, H, W) -> features (B, D); in eval mode, without gradients."""
    name: str
    """Its name in tables."""
    digest: str
    """SHA-256 of the weights, the first 16 hexadecimal digits."""
    mean: list[float]
    std: list[float]
    """Of each channel, for values from 0 to 1."""
    resize: int
    """Shorter side of an evaluated image before the center crop (pixels)."""
    size: int
    """Side of the center crop (pixels)."""
    rebuild: Callable[..., nn.Module]
    """`rebuild(drop_path_rate=0.1)`: the same architecture with new random weights, all of them trainable."""
    trained: bool = True
    """False for the untrained baseline."""
    description: dict[str, Any] | None = None
    """Architecture and preprocessing as a dictionary, for files that `checkpoint=` loads; None if unknown."""

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return len(self.mean)

    @property
    def width(self) -> int:
        """Features per image, D."""
        backbone = cast(Any, self.backbone)
        # Networks with a layer between pooling and classifier, such as mobilenetv3, return that layer's output.
        return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)


def check_size(network: FrozenNetwork, size: int, *, key: str) -> None:
    """Raise `UserError`, naming `key`, if the network does not accept images of this side (pixels)."""
    if is_vit(network.backbone) and size % patch_size(network.backbone):
        patch = patch_size(network.backbone)
        near = max(patch, round(size / patch) * patch)
        raise UserError(
            f"{key}={size} is not a multiple of the patch size {patch} of {network.name}; the nearest is {near}."
        )
    device = next(network.backbone.parameters()).device
    with rejection_as(f"{key}={size}: {network.name} does not accept this size"):
        network.backbone(torch.zeros(1, network.channels, size, size, device=device))


@contextmanager
def rejection_as(message: str) -> Iterator[None]:
    """Raise `UserError`, with `message` and the reason, if a network rejects its images in the block; no gradients."""
    try:
        with torch.no_grad():
            yield
    except UserError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"{message} ({' '.join(str(error).split())}).") from error
