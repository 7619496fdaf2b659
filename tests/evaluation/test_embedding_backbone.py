"""`load_backbone`: the frozen network and its images; and an import that costs nothing."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from embedding_cases import CHECKPOINT, MEAN, STD, picture_files, pictures
from PIL import Image
from torch import nn

import dino_lightning
from dino_lightning import load_backbone
from dino_lightning.checkpoints import load_network
from dino_lightning.errors import UserError


def test_prepared_images_are_those_of_the_evaluation(tmp_path: Path) -> None:
    backbone = load_backbone(CHECKPOINT)
    (file,), (pixels,) = picture_files(tmp_path, 1), pictures(1)
    large = Image.open(file).resize((256, 256), Image.Resampling.BICUBIC).crop((16, 16, 240, 240))
    want = (np.asarray(large, dtype=np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    for image in (file, str(file), Image.open(file), pixels):
        prepared = backbone.prepare(image)
        assert prepared.shape == (3, backbone.size, backbone.size)
        torch.testing.assert_close(prepared, torch.from_numpy(want).permute(2, 0, 1), rtol=0, atol=1e-6)


def test_the_backbone_is_the_frozen_network_of_the_checkpoint() -> None:
    backbone, network = load_backbone(CHECKPOINT), load_network(CHECKPOINT)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(backbone(images), network.backbone(images))
    assert backbone(images).shape == (2, backbone.width)
    model = nn.Sequential(backbone, nn.Linear(backbone.width, 3)).train()
    assert not any(module.training for module in backbone.modules())
    model(images).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["1.weight", "1.bias"]


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture")
    backbone = load_backbone(CHECKPOINT)
    with pytest.raises(UserError, match=r"x\.png cannot be read \(not an image format that PIL supports"):
        backbone.prepare(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"images\[0\] is of type int; expected a path"):
        backbone.prepare(3)  # type: ignore[arg-type]
    for device in ("gpu0", "xpu:7"):
        with pytest.raises(UserError, match=f"device={device}: PyTorch cannot use such a device"):
            load_backbone(CHECKPOINT, device=device)
    with pytest.raises(UserError, match="checkpoint_key=techer"):
        load_backbone(CHECKPOINT, key="techer")


def test_import_loads_nothing() -> None:
    code = "import sys, dino_lightning as d; print(sorted({'torch', 'numpy', 'hydra'} & set(sys.modules)), dir(d))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ")
    for name in dino_lightning.__all__:
        assert f"'{name}'" in done.stdout
        assert callable(getattr(dino_lightning, name))
    with pytest.raises(AttributeError, match="has no attribute 'embedd'"):
        dino_lightning.embedd  # noqa: B018
