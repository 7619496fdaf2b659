"""Networks with weights far from their initial values, and exported files of them, for tests of loading and export."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from dino_lightning.checkpoints import Description, export_backbone
from dino_lightning.config import BackboneConfig, TimmConfig, ViTConfig

TINY = ViTConfig(width=64, depth=1, heads=1, patch_size=8)
RESNET = TimmConfig(name="resnet18")
PREPROCESSING = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "resize": 40, "size": 32}
FOLDERS_OF_TIMM = pytest.mark.skipif(
    tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 26), reason="timm reads no safetensors from a folder"
)


def with_noise(network: nn.Module) -> nn.Module:
    """The network in eval mode, with noise added so that all weights, including positions, influence the output.

    Convolutions are unchanged: their noise would grow from layer to layer.
    """
    for tensor in network.state_dict().values():
        if tensor.ndim == 1:
            tensor.add_(torch.rand_like(tensor) * 0.1)
        elif tensor.ndim in (2, 3):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return network.eval().requires_grad_(False)


def exported(folder: Path, config: BackboneConfig = TINY, *, image_size: int = 32) -> Path:
    """Export a network as a run does; returns the path."""
    from dino_lightning.models.backbones import build_backbone

    network = with_noise(build_backbone(config, image_size=image_size, drop_path=False))
    path = folder / "weights.safetensors"
    export_backbone(network.state_dict(), path, Description(config, image_size, **PREPROCESSING))  # type: ignore[arg-type]
    return path
