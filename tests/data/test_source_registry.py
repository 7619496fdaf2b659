"""A user-defined data source in one file: registered by a decorator, opened through `imports=`, and trained."""

from pathlib import Path

import pytest
from composing import SMALL
from programs import run_program

from dino_lightning.config import SCHEMAS, DataConfig
from dino_lightning.data.sources import open_sources
from dino_lightning.data.sources.registry import SOURCES, source_for

ROOT = Path(__file__).parents[2]
SOURCE = '''
"""Two dozen images of noise in two classes."""

from dataclasses import dataclass

import numpy as np

from dino_lightning.config import DataConfig
from dino_lightning.data.sources import Splits, register_source
from dino_lightning.data.sources.base import content_digest


@dataclass
class NoiseConfig(DataConfig):
    """Images of noise."""

    size: int = 32
    """Side of an image (pixels)."""


class NoiseImages:
    def __init__(self, size: int) -> None:
        self.images = np.random.default_rng(0).integers(0, 256, (24, size, size, 3), dtype=np.uint8)
        self.labels, self.classes = np.arange(24) % 2, ["even", "odd"]

    def __len__(self):
        return len(self.images)

    def read(self, index):
        return self.images[index]

    def describe(self, index):
        return f"noise {index}"

    def fingerprint(self):
        return content_digest(self.images.tobytes())


@register_source("noise", NoiseConfig)
def open_noise(config: NoiseConfig) -> Splits:
    return Splits(NoiseImages(config.size), None, "noise")
'''


def test_a_user_defined_source_trains(tmp_path: Path) -> None:
    (tmp_path / "noise.py").write_text(SOURCE)
    small = [override for override in SMALL if not override.startswith("data")]
    words = [*small, "imports=noise.py", "data=noise", "data.size=24", "data.holdout=0.25", "output_dir=out"]
    words += ["data.batch_size_per_device=8", "data.num_workers=0", "trainer.max_epochs=1"]
    words += ["trainer.enable_progress_bar=false", "callbacks.pictures.enabled=false"]
    done = run_program(str(ROOT / "train.py"), *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "25% of the images (6) are held out" in " ".join((done.stdout + done.stderr).split())
    config = (tmp_path / "out" / "config.yaml").read_text()
    assert "size: 24" in config
    assert "noise.py" in config


def test_built_in_sources_are_registered_by_their_modules() -> None:
    names = [name for name, schema in SCHEMAS["data"].items() if issubclass(schema, DataConfig)]
    assert len(names) >= 9
    for name in names:
        config = SCHEMAS["data"][name]()
        assert source_for(config).__module__ == f"dino_lightning.data.sources.{name}"
        assert type(config) in SOURCES


def test_an_unregistered_configuration_is_named() -> None:
    with pytest.raises(TypeError, match="no source is registered for DataConfig"):
        open_sources(DataConfig(), seed=0)
