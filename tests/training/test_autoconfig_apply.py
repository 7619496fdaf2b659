"""`auto.data=true` measures the images and sets keys that the command line does not."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import pytest
from composing import composed
from omegaconf import OmegaConf
from PIL import Image

from dino_lightning.config import TrainConfig, TrainerConfig
from dino_lightning.config.checks.training import check_config
from dino_lightning.errors import UserError
from dino_lightning.runtime.files import CONF
from dino_lightning.training.autoconfig.apply import (
    AutoconfigResult,
    autoconfigure,
    device_count,
    overridden_keys,
    print_suggestions,
    run_length_epochs,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images of 2 classes, 48 to 77 pixels high and wider than that."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(30):
        path = root / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 255, (48 + index, 100 + index, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return root


def suggested(folder: Path, *words: str, output_dir: Path | str = "never-written") -> tuple[Any, AutoconfigResult]:
    """The configuration of `dino train experiment=small_data data=folder WORDS`, and the suggestions."""
    usual = ["experiment=small_data", "data=folder", f"data.path={folder}", "trainer.accelerator=cpu"]
    cfg = composed(*usual, *words, output_dir=output_dir)
    result = autoconfigure(cfg, cli_overrides=words)
    assert result is not None
    return cfg, result


def test_the_images_are_counted_and_measured(folder: Path) -> None:
    cfg, result = suggested(folder, "data.holdout=0.2", "data.batch_size_per_device=4", "trainer.max_epochs=50")
    assert result.stats.images == 24, "those held out as queries do not train"
    assert 55 < result.stats.side < 70
    assert (result.total_batch, result.epochs) == (4, 50)
    assert cfg.crops.global_size == 64
    assert cfg.backbone.patch_size == 8
    check_config(cast(TrainConfig, OmegaConf.to_object(cfg)))


def test_every_row_is_in_the_configuration(folder: Path) -> None:
    cfg, result = suggested(folder)
    assert len(result.suggestions) >= 14
    for row in result.suggestions:
        assert OmegaConf.select(cfg, row.key) == row.value, row


def test_the_command_line_wins_and_files_do_not(folder: Path) -> None:
    words = ["method.out_dim=100", "++optim.lr=0.03", "crops.local_scale=[0.1,0.2]", "trainer.max_epochs=7"]
    cfg, result = suggested(folder, *words, "preset=quick")  # whose file has other crops and another lr
    assert (cfg.method.out_dim, cfg.optim.lr, cfg.crops.local_scale) == (100, 0.03, [0.1, 0.2])
    assert {row.key for row in result.suggestions if row.by_user} == {"method.out_dim", "optim.lr", "crops.local_scale"}
    assert cfg.crops.global_scale == [0.4, 1.0]
    assert cfg.trainer.max_epochs == 7


def test_without_auto_nothing_changes(folder: Path) -> None:
    cfg = composed("experiment=small_data", "auto.data=false", "data=folder", f"data.path={folder}")
    before = cfg.copy()
    assert autoconfigure(cfg, cli_overrides=[]) is None
    assert cfg == before
    assert composed("data=folder", "data.path=.").auto.data is False


@pytest.mark.parametrize("method", ["dino", "byol", "moco", "swav", "supervised"])
@pytest.mark.parametrize("backbone", ["vit_tiny", "resnet18"])
@pytest.mark.slow_after_first(5)
def test_any_method_and_network_pass_the_checks(folder: Path, method: str, backbone: str) -> None:
    cfg, result = suggested(folder, f"method={method}", f"backbone={backbone}")
    check_config(cast(TrainConfig, OmegaConf.to_object(cfg)))
    assert result.suggestions


@pytest.mark.parametrize("experiment", ["quick", "photos32", "vits16_100ep", "resnet50", "vitb8"])
def test_it_works_with_any_experiment(folder: Path, experiment: str) -> None:
    words = [f"experiment={experiment}", "auto.data=true", "data=folder", f"data.path={folder}", "trainer.precision=32"]
    cfg = composed(*words, "trainer.accelerator=cpu", "trainer.devices=1")
    assert autoconfigure(cfg, cli_overrides=[]) is not None
    check_config(cast(TrainConfig, OmegaConf.to_object(cfg)))


def test_a_resumed_run_keeps_its_values(folder: Path, tmp_path: Path) -> None:
    cfg, _ = suggested(folder, "method.out_dim=77", output_dir=tmp_path)
    OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
    later = ["resume=true", "data.holdout=0.8", "data.batch_size_per_device=2"]  # fewer images, another batch
    again, result = suggested(folder, *later, "optim.lr=0.5", output_dir=tmp_path)
    assert again.method == cfg.method
    assert again.crops == cfg.crops
    assert again.optim.lr == 0.5, "the command line wins here, too"
    assert {row.reason for row in result.suggestions} == {"as when the run began", "yours"}


def test_broken_images_are_skipped_and_only_broken_ones_are_refused(folder: Path, tmp_path: Path) -> None:
    for index in range(4):
        path = tmp_path / "a" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="auto.data=true: none of the tested images"):
        suggested(tmp_path)
    Image.new("RGB", (40, 20)).save(tmp_path / "a" / "good.png")
    assert suggested(tmp_path)[1].stats.side == 20


def test_a_stream_is_measured_by_its_first_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos-000.tar", "w") as tar:
        for index in range(5):
            encoded = io.BytesIO()
            Image.new("RGB", (100, 96 + 8 * (index > 2))).save(encoded, "PNG")
            member = tarfile.TarInfo(f"{index:03}.png")
            member.size = encoded.tell()
            tar.addfile(member, io.BytesIO(encoded.getvalue()))
    words = ["experiment=small_data", "data=webdataset", f"data.shards={tmp_path}", "data.images=4000"]
    result = autoconfigure(composed(*words, "trainer.accelerator=cpu"), cli_overrides=words)
    assert result is not None
    assert (result.stats.images, result.stats.side) == (4000, 96)


@pytest.mark.parametrize("devices", ["auto", 1, 2, "3", "2,", "0,1", [0], [0, 1]])
def test_devices_are_counted_as_lightning_does(devices: Any) -> None:
    on_cpu = (isinstance(devices, str) and "," not in devices) or isinstance(devices, int)  # elsewhere lists name GPUs
    counted = device_count(TrainerConfig(accelerator="cpu", devices=devices))
    if on_cpu:
        assert counted == L.Trainer(accelerator="cpu", devices=devices, logger=False, barebones=True).num_devices
    else:
        assert counted == len([part for part in str(devices).strip("[]").split(",") if part.strip()])


def test_length_is_the_shorter_of_epochs_and_steps() -> None:
    def epochs(**options: Any) -> float:
        return run_length_epochs(TrainerConfig(**options), images=1000, total_batch=100)

    assert epochs(max_epochs=30) == 30
    assert epochs(max_epochs=30, max_steps=50) == 5
    assert epochs(max_epochs=-1, max_steps=50) == 5
    assert epochs(max_epochs=3, max_steps=50) == 3


def test_overridden_keys() -> None:
    words = ["optim.lr=1", "++crops.ratio=[1,2]", "experiment=quick", "-m", "data.shards='a=b'", "data@other=folder"]
    assert overridden_keys(words) == ["optim.lr", "crops.ratio", "data.shards"]


def test_the_table_has_every_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, result = suggested(folder, "method.out_dim=100")
    print_suggestions(result)
    shown = capsys.readouterr().err
    assert "26 images of 64 px, total batch 128, 200 epochs" in shown
    for row in result.suggestions:
        assert row.key in shown
    assert "100" in next(line for line in shown.splitlines() if "method.out_dim" in line and "yours" in line)


@pytest.mark.slow
def test_the_command_prints_the_table_and_keeps_the_values(tmp_path: Path) -> None:
    words = ["experiment=small_data", "data=builtin", "data.train_images=64", "data.val_images=16", "seed=3"]
    words += ["data.num_workers=0", "data.batch_size_per_device=32", "trainer.accelerator=cpu", "trainer.max_epochs=1"]
    words += ["backbone=vit_micro", "backbone.depth=1", "method.head_hidden_dim=32", "optim.lr=0.003", "cpu_threads=1"]
    words += ["callbacks.knn.enabled=false", "callbacks.pictures.enabled=false", "trainer.enable_progress_bar=false"]
    words += ["trainer.enable_checkpointing=false", f"output_dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "train.py", *words], cwd=CONF.parent, capture_output=True, text=True, check=True
    )
    assert "Suggested for 64 images of 32 px, total batch 32, 1 epoch" in done.stderr
    assert done.stderr.index("Suggested for") < done.stderr.index("Network")
    config = OmegaConf.load(tmp_path / "config.yaml")
    assert (config.method.out_dim, config.backbone.patch_size, config.crops.global_size) == (64, 4, 32)
    assert config.optim.lr == 0.003
    assert any("optim.lr " in line and "yours" in line for line in done.stderr.splitlines())
