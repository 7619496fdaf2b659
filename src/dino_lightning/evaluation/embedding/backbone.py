"""A frozen network for your own programs.

    backbone = load_backbone("outputs/RUN", device="cuda")
    images = torch.stack([backbone.prepare(path) for path in paths]).to("cuda")
    features = backbone(images)                                              # (B, 3, size, size) -> (B, D)

B images of C channels, D width.
"""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from dino_lightning.checkpoints import load_network
from dino_lightning.config import DataConfig
from dino_lightning.data.bad_images import UNREADABLE, why_unreadable
from dino_lightning.data.decode import Decoder
from dino_lightning.errors import UserError
from dino_lightning.evaluation.embedding.inputs import ImageInput, as_image_list, input_source
from dino_lightning.evaluation.features.images import center_view


class Backbone(nn.Module):
    """A frozen network and the preparation of its images; always in eval mode, without gradients."""

    def __init__(self, checkpoint: str | Path, *, key: str | None = None) -> None:
        super().__init__()
        self.network = load_network(str(checkpoint), key=key)
        self.backbone = self.network.backbone
        """The network itself, with the interface of timm."""
        channels = self.network.channels
        self._view, self._decoder = center_view(self.network), Decoder(DataConfig(channels=channels))

    @property
    def width(self) -> int:
        """Features per image, D."""
        return self.network.width

    @property
    def size(self) -> int:
        """Side of a prepared image (pixels)."""
        return self.network.size

    def prepare(self, image: ImageInput) -> Tensor:
        """A path, a PIL image or pixels (H, W, C) uint8 as (C, size, size): resized, cropped, normalized, on the CPU.

        Raises `UserError` for an image that cannot be read.
        """
        channels = self.network.channels
        source = input_source(as_image_list([image]), channels)
        decode = self._decoder.pil if channels in (1, 3) else self._decoder.pixels
        try:
            return self._view(decode(source.read(0)))
        except UNREADABLE as error:
            raise UserError(f"{source.describe(0)} cannot be read ({why_unreadable(error)}).") from error

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Features (B, D) of prepared images."""
        return self.backbone(images_BCHW)

    def train(self, mode: bool = True) -> Self:
        """Do nothing: the network stays in eval mode, also inside a network that is trained."""
        return super().train(False)


def load_backbone(
    checkpoint: str | Path, *, key: str | None = None, device: str | torch.device | None = None
) -> Backbone:
    """The frozen network of a checkpoint, ready for images.

    `checkpoint` is a value of `checkpoint=`: a run's folder, an exported file, a `.ckpt`, a `.pth` of the original,
    `timm:NAME`, `untrained:NAME`. `key` selects `teacher` or `student` of a file with both; None is the one that the
    run evaluated. `device` None is the CPU. Raises `UserError` for anything else.
    """
    backbone = Backbone(checkpoint, key=key).eval()
    return backbone if device is None else backbone.to(usable_device(device))


def usable_device(name: str | torch.device) -> torch.device:
    """The device; `auto` is the first GPU, or the CPU. Raises `UserError` for a device that PyTorch cannot use."""
    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"device={name}: PyTorch cannot use such a device on this machine; expected auto, cpu or cuda."
        ) from error
    return device
