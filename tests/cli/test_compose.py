"""`dino_lightning.compose` in a user's program makes the same configuration as the command line."""

import logging
from pathlib import Path

import lightning as L
import pytest
from composing import SMALL, composed
from omegaconf import OmegaConf
from PIL import Image

from dino_lightning import compose
from dino_lightning.errors import UserError
from dino_lightning.training.autoconfig.data_rules import suggest_from_data
from dino_lightning.training.build import build_data, build_method, build_trainer
from dino_lightning.training.callbacks.knn import KNNCallback


@pytest.mark.parametrize("words", [(), ("method=byol", "backbone=resnet18"), ("data=cifar10", "seed=3")])
@pytest.mark.slow_after_first(2)
def test_compose_equals_the_command_line(words: tuple[str, ...], tmp_path: Path) -> None:
    expected = OmegaConf.to_object(composed(*words, output_dir=tmp_path / "run"))
    assert compose(*words, f"output_dir={tmp_path / 'run'}") == expected


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("method=dyno", "method=dyno is not an option of method; did you mean 'dino'?"),
        ("optim.lrr=1", "optim.lrr"),
        ("crops.local_size=20", "crops.local_size=20 is not a multiple of backbone.patch_size=8; the nearest is 16."),
        ("optim.lr=much", "optim.lr"),
    ],
)
def test_compose_raises_the_errors_of_the_command_line(word: str, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        compose(word)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_automatic_settings_follow_the_images(tmp_path: Path) -> None:
    for i in range(40):
        Image.new("RGB", (70, 64), (6 * i, 0, 0)).save(tmp_path / f"{i}.png")
    words = ["experiment=small_data", "data=folder", f"data.path={tmp_path}", "callbacks.knn.enabled=false"]
    config = compose(*words, "data.batch_size_per_device=4", "trainer.max_epochs=50", "optim.lr=0.003")
    rows = suggest_from_data(36, side=64, total_batch=4, epochs=50, user_values={"optim.lr": 0.003})
    expected = {row.key: row.value for row in rows}
    assert config.method.out_dim == expected["method.out_dim"] == 64
    assert config.method.teacher_momentum == expected["method.teacher_momentum"]
    assert config.crops.global_size == expected["crops.global_size"] == 64
    assert config.optim.lr == 0.003


@pytest.mark.slow
def test_two_fits_in_one_process(tmp_path: Path) -> None:
    """As in a notebook: Lightning's trainer fits two of our methods one after the other."""
    for method in ("dino", "byol"):
        config = compose(*SMALL, f"method={method}", "trainer.max_epochs=1", f"output_dir={tmp_path}")
        module, knn = build_method(config), KNNCallback(config.callbacks.knn)
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            callbacks=[knn],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=build_data(config))
        assert trainer.global_step == 6
        assert 0 < knn.last["top1"] <= 100
    assert list(tmp_path.iterdir()) == []


def test_building_a_trainer_logs_nothing(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """A second trainer, built only to learn which strategy `auto` is, would repeat Lightning's messages."""
    logger = logging.getLogger("lightning.pytorch")
    logger.setLevel(logging.INFO)  # Lightning's default, which other tests may have changed
    logger.addHandler(caplog.handler)
    try:
        build_trainer(compose(*SMALL, f"output_dir={tmp_path}"), hyperparameters={})
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []
