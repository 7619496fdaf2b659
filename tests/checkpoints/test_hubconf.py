"""`torch.hub.load` on this checkout."""

from pathlib import Path

import pytest
import torch
from network_cases import exported
from PIL import Image

from dino_lightning.checkpoints import load_network

PROJECT = str(Path(__file__).parents[2])


def test_backbone_and_transform(tmp_path: Path) -> None:
    path = exported(tmp_path)
    backbone = torch.hub.load(PROJECT, "backbone", source="local", checkpoint=str(path))
    images = torch.randn(2, 3, 32, 48)
    assert torch.equal(backbone(images), load_network(str(path)).backbone(images))
    transform = torch.hub.load(PROJECT, "transform", source="local", checkpoint=str(path))
    assert transform(Image.new("RGB", (60, 50))).shape == (3, 32, 32)
    with pytest.raises(ValueError, match="checkpoint=nowhere: this file does not exist"):
        torch.hub.load(PROJECT, "backbone", source="local", checkpoint="nowhere")
