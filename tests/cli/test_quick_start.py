"""`dino train DIR` without other arguments: the automatic settings, a run, and tab completion."""

import json
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
from programs import run_program

from dino_lightning.cli.overrides import prepare_training, with_home_folders, with_quick_start
from dino_lightning.config import TrainConfig, register
from dino_lightning.config.checks.training import check_config
from dino_lightning.data.sources.detect import detect_source
from dino_lightning.errors import UserError
from dino_lightning.training.autoconfig.apply import autoconfigure

PROGRAMS = Path(sys.executable).parent


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 photographs of 2 classes, 320 x 240, a quarter of them with an EXIF rotation."""
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
    """The configuration of a run that is started with `words`, with all automatic settings."""
    register()
    given = prepare_training(words, fast=fast)
    config = composition("config", *given, f"output_dir={output}")
    autoconfigure(config, cli_overrides=given)
    return config


def test_missing_settings_are_added_to_the_path() -> None:
    chosen = ["data=folder", "experiment=photos32", "auto.machine=true", "data.path=/x"]
    assert with_quick_start(["--multirun", "data.path=/x"], fast=False) == ["--multirun", *chosen]
    assert with_quick_start(["data.path=/x.zip"], fast=True)[:2] == ["data=archive", "experiment=small_data"]
    assert with_quick_start(["data.path='/x.csv'"], fast=False)[0] == "data=listing"
    own = ["data.path=/x", "backbone=resnet18", "trainer.accelerator=cpu"]
    assert "experiment=small_data" in with_quick_start(own), "the crops of photos32 need its own network"
    assert with_quick_start(["data.path=/x", "auto.machine=false"], fast=False).count("auto.machine=true") == 0


@pytest.mark.parametrize("word", ["data=folder", "experiment=quick", "preset=quick", "sweep=table7"])
def test_a_command_with_an_experiment_is_unchanged(word: str) -> None:
    assert with_quick_start(["data.path=/x", word]) == ["data.path=/x", word]
    assert with_quick_start(["optim.lr=1"]) == ["optim.lr=1"]


def test_archives_next_to_folders_of_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "2020" / "may").mkdir(parents=True)
    (tmp_path / "2020" / "may" / "1.JPG").touch()
    (tmp_path / "backup.zip").touch()
    with pytest.raises(UserError, match=r"\.zip files in '.*images in '.*2020'; set data=archive or data=folder"):
        with_quick_start([f"data.path={tmp_path}"], fast=False)
    assert with_quick_start([f"data.path={tmp_path}", "data=folder"], fast=False)[-1] == "data=folder"


def test_a_path_with_a_null_byte_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.path="):
        with_quick_start(["data.path=a\0b"], fast=False)


def test_an_archive_among_photographs_is_ignored(tmp_path: Path) -> None:
    for name in ("1.jpg", "2.jpg", "backup.zip"):
        (tmp_path / name).touch()
    assert detect_source(str(tmp_path)) == "folder"
    for name in ("a.zip", "b.zip"):
        (tmp_path / name).touch()
    assert detect_source(str(tmp_path)) == "archive"


@pytest.mark.skipif(
    torch.cuda.is_available() or torch.backends.mps.is_available(), reason="this machine has the device"
)
def test_a_missing_device_is_refused_before_a_trial(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trainer.accelerator=gpu: this machine has no GPU"):
        settings([f"data.path={photos}", "trainer.accelerator=gpu"], fast=True, output=tmp_path)


@pytest.mark.parametrize("fast", [False, True])
def test_automatic_settings_pass_the_checks(photos: Path, tmp_path: Path, *, fast: bool) -> None:
    config = settings([f"data.path={photos}", "trainer.accelerator=cpu"], fast=fast, output=tmp_path)
    check_config(cast(TrainConfig, OmegaConf.to_object(config)))
    assert config.experiment == ("small_data" if fast else "photos32")
    assert config.data.batch_size_per_device <= 80
    assert config.data.apply_exif_rotation is True
    assert config.data.cache == ("none" if fast else "ram")
    assert config.callbacks.knn.enabled


def test_the_command_line_overrides_automatic_settings(photos: Path, tmp_path: Path) -> None:
    words = [f"data.path={photos}", "trainer.max_epochs=3", "data.cache=none", "data.apply_exif_rotation=false"]
    config = settings([*words, "trainer.accelerator=cpu"], fast=False, output=tmp_path)
    assert (config.trainer.max_epochs, config.data.cache, config.data.apply_exif_rotation) == (3, "none", False)
    assert config.callbacks.knn.every_n_epochs == 1


def test_a_resumed_run_keeps_length_and_batch_size(photos: Path, tmp_path: Path) -> None:
    words = [f"data.path={photos}", "trainer.accelerator=cpu"]
    first = settings(words, fast=False, output=tmp_path)
    OmegaConf.save(first, tmp_path / "config.yaml", resolve=True)
    later = settings([*words, "resume=true", "data.holdout=0.6"], fast=False, output=tmp_path)  # half of the images
    assert later.trainer == first.trainer
    assert later.data.batch_size_per_device == first.data.batch_size_per_device


def test_a_flat_folder_trains_without_labels(photos: Path, tmp_path: Path) -> None:
    """The command of the README, but shorter."""
    flat = tmp_path / "~ my photos"
    flat.mkdir()
    for path in photos.rglob("*.jpg"):
        (flat / path.name).symlink_to(path)
    words = ["train", str(flat), "trainer.max_epochs=1", "trainer.accelerator=cpu", "cpu_threads=1"]
    done = run_program("dino_lightning", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in ("callbacks.knn.enabled", "no class folders", "data.cache", "80 images", "photos32"):
        assert text in " ".join(done.stderr.split()), done.stderr
    (run,) = (tmp_path / "outputs").iterdir()
    assert {path.name for path in (run / "pictures").iterdir()} >= {"crops.png", "neighbors.png"}
    assert str(run / "report.html") in done.stdout


COMPLETE = """
import json, sys
from dino_lightning.cli.main import main
main(["-sc", "query=bash"])
print(json.dumps(sorted(sys.modules)))
"""


def test_completion_imports_neither_torch_nor_timm() -> None:
    line = "dino train backbone=vit_"
    environment = os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    command = [sys.executable, "-c", COMPLETE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *completions, modules = done.stdout.splitlines()
    assert "backbone=vit_small" in " ".join(completions).split()
    assert not {"torch", "timm", "lightning"} & set(json.loads(modules))


@pytest.fixture(scope="module")
def bash_script() -> str:
    """The definitions that `dino` gives to bash."""
    command = [PROGRAMS / "dino", "train", "-sc", "install=bash"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def completions(line: str, definitions: str, **variables: str) -> set[str]:
    """The completions of `line` in bash."""
    script = f"""
    {definitions}
    COMP_LINE="$1"; COMP_POINT=${{#1}}; COMP_WORDS=($1); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
    hydra_bash_completion
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = os.environ | {"PATH": f"{PROGRAMS}:{os.environ['PATH']}"} | variables
    done = subprocess.run(["bash", "-c", script, "bash", line], env=environment, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dino t", "train"),
        pytest.param("dino train backbone=vit_", "backbone=vit_small", marks=pytest.mark.slow),
        pytest.param("dino train crops.loc", "crops.local_count=", marks=pytest.mark.slow),
        ("dino train ~/photos trainer.max_e", "trainer.max_epochs="),
        pytest.param("dino train backbone=resnet18 optim.l", "optim.lr=", marks=pytest.mark.slow),
        pytest.param("dino eval ~/x eval=kn", "eval=knn", marks=pytest.mark.slow),
        pytest.param("dino embed x ~/photos batch", "batch_size_per_device=", marks=pytest.mark.slow),
    ],
)
def test_tab_completion(line: str, expected: str, bash_script: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    assert expected in completions(line, bash_script, HOME=str(tmp_path))


def test_home_folders_are_replaced_before_the_source_is_detected(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.zip").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "data=archive" in with_quick_start(with_home_folders(["data.path=~/photos"]), fast=False)


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_help_may_be_piped_into_head() -> None:
    command = f"{PROGRAMS / 'dino'} train --help | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("T0\n", "")
