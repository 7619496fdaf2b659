"""A backbone from one file of the user, in training, in a checkpoint and in an export."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from composing import SMALL
from hydra.core.config_store import ConfigStore
from programs import run_program

from dino_lightning.checkpoints import load_network
from dino_lightning.cli.plugins import import_one
from dino_lightning.config import SCHEMAS
from dino_lightning.errors import UserError
from dino_lightning.models.registry import BACKBONES

ROOT = Path(__file__).parents[1]
FILE = """
from dataclasses import dataclass

from torch import nn

from dino_lightning.config import BackboneConfig
from dino_lightning.models.registry import register_backbone


@dataclass
class ConvConfig(BackboneConfig):
    width: int = 24  # also a key of the package's own ViT


class Conv(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.num_features = width
        self.layers = nn.Sequential(nn.Conv2d(channels, width, 4, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, images):
        return self.layers(images).flatten(1)


@register_backbone("conv", ConvConfig)
def conv(config, *, image_size, channels, drop_path_rate):
    return Conv(channels, config.width)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with the backbone of `own.py`."""
    folder = tmp_path_factory.mktemp("own_backbone")
    (folder / "own.py").write_text(FILE)
    words = [*SMALL, "imports=own.py", "backbone=conv", "backbone.width=12", "trainer.max_epochs=1", "output_dir=out"]
    words += ["data.train_images=32", "trainer.enable_progress_bar=false"]
    done = run_program(str(ROOT / "train.py"), *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def imported(folder: Path) -> Iterator[None]:
    """Imports the backbone until the end of a test."""
    import_one(str(folder / "own.py"))
    yield
    del BACKBONES[SCHEMAS["backbone"].pop("conv")]
    for option in ("conv", "schema_conv"):
        del ConfigStore.instance().repo["backbone"][f"{option}.yaml"]
    del sys.modules["dino_lightning.cli.plugins.own"]


@pytest.mark.parametrize("file", ["teacher.safetensors", "checkpoints/last.ckpt"])
def test_it_trains_and_its_weights_load(folder: Path, file: str, request: pytest.FixtureRequest) -> None:
    path = str(folder / "out" / file)
    with pytest.raises(UserError, match=r"^checkpoint=\S+: its backbone=conv is not part of this package; add "):
        load_network(path)
    request.getfixturevalue("imported")
    network = load_network(path)
    assert network.backbone(torch.zeros(2, 3, 40, 40)).shape == (2, network.width) == (2, 12)
