"""`init_from`: training from the weights of another network."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import oracles
import pytest
import torch
from composing import SMALL, composed
from network_cases import PREPROCESSING, TINY, exported
from omegaconf import OmegaConf

from dino_lightning.checkpoints import load_network
from dino_lightning.config import TrainConfig
from dino_lightning.errors import UserError
from dino_lightning.training.build import build_method
from dino_lightning.training.preflight import load_init_network
from dino_lightning.training.run import train

BACKBONE = ["backbone=vit_micro", "backbone.width=64", "backbone.depth=1", "backbone.heads=1", "backbone.patch_size=8"]


def configured(*words: str) -> TrainConfig:
    return cast(TrainConfig, OmegaConf.to_object(composed(*SMALL, *BACKBONE, *words)))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_network(str(path)).backbone.state_dict())


@pytest.mark.parametrize("method", ["dino", "supervised"])
def test_all_backbones_start_from_these_weights(method: str, tmp_path: Path) -> None:
    path = exported(tmp_path)
    config = configured(f"init_from={path}", f"method={method}")
    module: Any = build_method(config, num_classes=3, init_network=load_init_network(config))
    for network in ("student", "teacher") if method == "dino" else ("student",):
        state = getattr(module, network).backbone.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in weights(path).items())


def test_another_image_size_resamples_the_position_embedding(tmp_path: Path) -> None:
    path = exported(tmp_path, image_size=64)
    config = configured(f"init_from={path}")
    assert config.crops.global_size == 32
    module: Any = build_method(config, init_network=load_init_network(config))
    state = module.student.backbone.state_dict()
    assert state["pos_embed"].shape == (1, 1 + 16, 64)
    images = torch.randn(2, 3, 32, 32)
    expected, _ = oracles.vit(weights(path), images, patch=8, heads=1)
    features, _ = oracles.vit(state, images, patch=8, heads=1)
    # Float32 rounding of the resampled table gives about 2e-5; another resampling method differs by 1e-2.
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_a_run_starts_from_the_weights_and_resumes_without_the_file(tmp_path: Path) -> None:
    path = exported(tmp_path)
    words = [
        *SMALL,
        *BACKBONE,
        f"init_from={path}",
        "trainer.max_steps=1",
        "optim.lr=0",
        "optim.lr_end=0",
        "callbacks.knn.enabled=false",
        "callbacks.pictures.enabled=false",
    ]
    train(composed(*words, output_dir=tmp_path / "run"))
    left, given = weights(tmp_path / "run"), weights(path)
    assert all(torch.allclose(left[name], given[name], rtol=1e-5, atol=1e-6) for name in given)
    path.unlink()
    train(composed(*words, "trainer.max_steps=2", "resume=true", output_dir=tmp_path / "run"))
    with pytest.raises(UserError, match="resume: init_from was .* and is now null"):
        train(composed(*words, "init_from=null", "resume=true", output_dir=tmp_path / "run"))


def test_another_normalization_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = exported(tmp_path)
    load_init_network(configured(f"init_from={path}"))
    assert f"was trained on images normalized by crops.mean={PREPROCESSING['mean']}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["backbone.heads=2"], "has 1 attention heads, but the configured backbone has 2; choose the matching"),
        (["backbone.depth=2"], "does not fit the configured backbone: missing blo"),
        (
            ["backbone=resnet18"],
            "does not fit the configured backbone: missing conv1.weight",
        ),
        (
            ["init_from=null", "init_key=student"],
            "init_key=student selects a network of init_from, but init_from is not set",
        ),
        (["init_key=student"], "init_key=student: .* contains only the teacher"),
        (["init_from=nowhere"], "init_from=nowhere: this file does not exist"),
        (["backbone=timm", "backbone.name=resnet18", "backbone.pretrained=true"], "both set the initial weights"),
    ],
)
def test_refusals(words: list[str], sentence: str, tmp_path: Path) -> None:
    path = exported(tmp_path, replace(TINY, depth=1))
    keep = [] if any(word.startswith("backbone=") for word in words) else BACKBONE
    config = cast(TrainConfig, OmegaConf.to_object(composed(*SMALL, *keep, f"init_from={path}", *words)))
    with pytest.raises(UserError, match=sentence):
        load_init_network(config)
