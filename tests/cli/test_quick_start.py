"""`dino train DIR` alone: what is chosen, what is left alone, the run itself, and tab completion."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from composing import composition
from omegaconf import OmegaConf
from PIL import Image

from dino_lightning.cli.overrides import prepare_training, with_home_folders, with_quick_start
from dino_lightning.config import TrainConfig, register
from dino_lightning.config.checks.training import check_config
from dino_lightning.data.sources.detect import detect_source
from dino_lightning.errors import UserError
from dino_lightning.training.autoconfig.apply import autoconfigure

PROGRAMS = Path(sys.executable).parent


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 photographs of 2 classes, 320 x 240, a quarter of them taken with the camera turned."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(80):
        path = root / f"class{index % 2}" / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        image = Image.fromarray(np.random.default_rng(index).integers(0, 255, (24, 32, 3), np.uint8)).resize((320, 240))
        exif = Image.Exif()
        exif[274] = 6 if index % 4 == 0 else 1
        image.save(path, exif=exif)
    return root


def settings(words: list[str], *, fast: bool, output: Path) -> Any:
    """The configuration of the run that the words start, with everything that is chosen for it."""
    register()
    given = prepare_training(words, fast=fast)
    config = composition("config", *given, f"output_dir={output}")
    autoconfigure(config, cli_overrides=given)
    return config


def test_what_is_missing_is_put_beside_the_path() -> None:
    chosen = ["data=folder", "experiment=photos32", "auto.machine=true", "data.path=/x"]
    assert with_quick_start(["--multirun", "data.path=/x"], fast=False) == ["--multirun", *chosen]
    assert with_quick_start(["data.path=/x.zip"], fast=True)[:2] == ["data=archive", "experiment=small_data"]
    assert with_quick_start(["data.path='/x.csv'"], fast=False)[0] == "data=listing"
    own = ["data.path=/x", "backbone=resnet18", "trainer.accelerator=cpu"]
    assert "experiment=small_data" in with_quick_start(own), "photos32 has crops for a network of its own"
    assert with_quick_start(["data.path=/x", "auto.machine=false"], fast=False).count("auto.machine=true") == 0


@pytest.mark.parametrize("word", ["data=folder", "experiment=quick", "preset=quick", "sweep=table7"])
def test_a_command_that_says_what_it_wants_is_left_alone(word: str) -> None:
    assert with_quick_start(["data.path=/x", word]) == ["data.path=/x", word]
    assert with_quick_start(["optim.lr=1"]) == ["optim.lr=1"]


def test_archives_beside_folders_of_images_are_a_question(tmp_path: Path) -> None:
    (tmp_path / "2020" / "may").mkdir(parents=True)
    (tmp_path / "2020" / "may" / "1.JPG").touch()
    (tmp_path / "backup.zip").touch()
    with pytest.raises(UserError, match=r"\.zip files in '.*images in '.*2020'; set data=archive or data=folder"):
        with_quick_start([f"data.path={tmp_path}"], fast=False)
    assert with_quick_start([f"data.path={tmp_path}", "data=folder"], fast=False)[-1] == "data=folder"


def test_a_path_that_cannot_be_one() -> None:
    with pytest.raises(UserError, match=r"data\.path="):
        with_quick_start(["data.path=a\0b"], fast=False)


def test_an_archive_among_photographs_is_not_the_data(tmp_path: Path) -> None:
    for name in ("1.jpg", "2.jpg", "backup.zip"):
        (tmp_path / name).touch()
    assert detect_source(str(tmp_path)) == "folder"
    for name in ("a.zip", "b.zip"):
        (tmp_path / name).touch()
    assert detect_source(str(tmp_path)) == "archive"


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="the device is there")
def test_a_device_that_is_missing_is_said_before_a_trial_on_it(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trainer.accelerator=gpu: this machine has no GPU"):
        settings([f"data.path={photos}", "trainer.accelerator=gpu"], fast=True, output=tmp_path)


@pytest.mark.parametrize("fast", [False, True])
def test_the_settings_pass_the_checks(photos: Path, tmp_path: Path, *, fast: bool) -> None:
    config = settings([f"data.path={photos}", "trainer.accelerator=cpu"], fast=fast, output=tmp_path)
    check_config(cast(TrainConfig, OmegaConf.to_object(config)))
    assert config.experiment == ("small_data" if fast else "photos32")
    assert config.data.batch_size_per_device <= 80
    assert config.data.apply_exif_rotation is True
    assert config.data.cache == ("none" if fast else "ram")
    assert config.callbacks.knn.enabled


def test_the_command_line_wins(photos: Path, tmp_path: Path) -> None:
    words = [f"data.path={photos}", "trainer.max_epochs=3", "data.cache=none", "data.apply_exif_rotation=false"]
    config = settings([*words, "trainer.accelerator=cpu"], fast=False, output=tmp_path)
    assert (config.trainer.max_epochs, config.data.cache, config.data.apply_exif_rotation) == (3, "none", False)
    assert config.callbacks.knn.every_n_epochs == 1


def test_a_run_that_goes_on_keeps_length_and_batch(photos: Path, tmp_path: Path) -> None:
    words = [f"data.path={photos}", "trainer.accelerator=cpu"]
    first = settings(words, fast=False, output=tmp_path)
    OmegaConf.save(first, tmp_path / "config.yaml", resolve=True)
    later = settings([*words, "resume=true", "data.holdout=0.6"], fast=False, output=tmp_path)  # half of the images
    assert later.trainer == first.trainer
    assert later.data.batch_size_per_device == first.data.batch_size_per_device


def test_a_flat_folder_trains_without_labels(photos: Path, tmp_path: Path) -> None:
    """The command of the README, as a process, only shorter."""
    flat = tmp_path / "~ my photos"
    flat.mkdir()
    for path in photos.rglob("*.jpg"):
        (flat / path.name).symlink_to(path)
    words = [PROGRAMS / "dino", "train", flat, "trainer.max_epochs=1", "trainer.accelerator=cpu"]
    done = subprocess.run([*words, "cpu_threads=1"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for words_of_it in ("callbacks.knn.enabled", "no class folders", "data.cache", "80 images", "photos32"):
        assert words_of_it in " ".join(done.stderr.split()), done.stderr
    (run,) = (tmp_path / "outputs").iterdir()
    assert {path.name for path in (run / "pictures").iterdir()} >= {"crops.png", "neighbors.png"}
    assert str(run / "report.html") in done.stdout


def completions(line: str, program: str = "dino train", **variables: str) -> set[str]:
    """What bash offers after `line`, by the script that the program gives it."""
    script = f"""
    eval "$({program} -sc install=bash)"
    COMP_LINE="$1"; COMP_POINT=${{#1}}; COMP_WORDS=($1); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
    hydra_bash_completion
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = os.environ | {"PATH": f"{PROGRAMS}:{os.environ['PATH']}"} | variables
    done = subprocess.run(["bash", "-c", script, "bash", line], env=environment, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.skipif(sys.platform == "win32", reason="asks bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dino t", "train"),
        ("dino train backbone=vit_", "backbone=vit_small"),
        pytest.param("dino train crops.loc", "crops.local_count=", marks=pytest.mark.slow),
        ("dino train ~/photos trainer.max_e", "trainer.max_epochs="),
        pytest.param("dino train backbone=resnet18 optim.l", "optim.lr=", marks=pytest.mark.slow),
        pytest.param("dino eval ~/x eval=kn", "eval=knn", marks=pytest.mark.slow),
        pytest.param("dino embed x ~/photos batch", "batch_size_per_device=", marks=pytest.mark.slow),
    ],
)
def test_tab_completion(line: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    assert expected in completions(line, program="dino train", HOME=str(tmp_path))


def test_home_folders_are_replaced_before_the_kind_is_looked_for(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.zip").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "data=archive" in with_quick_start(with_home_folders(["data.path=~/photos"]), fast=False)


@pytest.mark.skipif(sys.platform == "win32", reason="asks bash")
def test_help_may_be_cut_off() -> None:
    command = f"{PROGRAMS / 'dino'} train --help | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("T0\n", "")
