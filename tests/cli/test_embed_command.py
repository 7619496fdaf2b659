"""`dino embed`: errors of one sentence, and the file of features, also after a kill and with two processes."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow.parquet as pq
import pytest
from composing import composed_embedding
from omegaconf import OmegaConf
from programs import run_program

from dino_lightning import embed
from dino_lightning.cli.embed import prepare, write_features
from dino_lightning.cli.errors import EXPLAINED, message_for
from dino_lightning.cli.help import group_options
from dino_lightning.cli.overrides import with_home_folders
from dino_lightning.config import BuiltinData, EmbedConfig
from dino_lightning.evaluation.embedding.checks import check_embedding, check_output

ROOT = Path(__file__).parents[2]
NETWORK = ["checkpoint=untrained:vit_micro", "image_size=32"]
FEW = ["data=builtin", "data.train_images=12", "data.val_images=5", "data.num_workers=0"]

WRONG = [
    ("data=builtin", "checkpoint has no value"),
    ("checkpoint=x", "data.path has no value"),
    ("checkpoint=x data.path=/nowhere/x", "checkpoint=x: this file does not exist; … contains no checkpoint."),
    ("checkpoint=untrained:vit_micro data.path=/nowhere-at-all", "data.path=/nowhere-at-all does not exist"),
    ("checkpoint=x data=davis data.path=.", "data=davis does not belong to this program; choose data=builtin or"),
    ("checkpoint=x data=builtin eval=knn", "eval=… is not for dino embed; --help lists its groups."),
    ("checkpoint=x data=builtin feature=class", "feature is not a key of the configuration; did you mean 'features'?"),
    ("checkpoint=x data=builtin +foo=1", "foo is not a key"),
    (
        "checkpoint=x data=builtin output_dir=x",
        "output_dir is a key of dino train and dino eval only",
    ),
    ("checkpoint=x data=builtin data.holdout=0.2", "data.holdout=0.2: data.holdout is for training, dino embed does"),
    ("checkpoint=x data=builtin data.batch_size_per_device=2", "not use it; set batch_size_per_device."),
    (
        "checkpoint=x data=builtin trainer=default",
        "trainer=default does not belong to this program; choose trainer=devices.",
    ),
    ("checkpoint=x data=builtin image_resize=40", "image_resize=40 needs image_size"),
    ("checkpoint=x data=builtin image_resize=40 image_size=48", "image_resize=40 is smaller than image_size=48"),
    ("checkpoint=x data=builtin trainer.strategy=fsdp", "trainer.strategy=fsdp:"),
    ("checkpoint=x data=builtin output=photos", "output=…/photos: expected a file name that ends in .parquet or .npy."),
]


@pytest.mark.parametrize(("overrides", "expected"), WRONG, ids=[overrides for overrides, _ in WRONG])
def test_wrong_settings_are_refused_in_one_sentence(
    overrides: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = overrides.split()
    with pytest.raises(EXPLAINED) as caught:
        write_features(composed_embedding(*words, output="x.parquet"), overrides=words)
    sentence = message_for(caught.value, verb="embed").replace(str(tmp_path), "…")
    assert expected in sentence
    assert "\n" not in sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", group_options("embed")["data"])
@pytest.mark.slow_after_first(7)
def test_every_data_option_composes(option: str) -> None:
    assert composed_embedding(f"data={option}", "checkpoint=x").data.max_bad_share == 1


def test_commands_in_the_documentation_pass_the_checks(tmp_path: Path) -> None:
    text = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL))
    commands = [line.split("#")[0] for line in blocks.splitlines() if line.startswith("dino embed")]
    assert len(commands) >= 3
    for command in commands:
        words = [word for word in prepare(shlex.split(command)[2:]) if "trainer." not in word]
        config = cast(EmbedConfig, OmegaConf.to_object(composed_embedding(*words)))
        check_embedding(config, overrides=words)
        check_output(tmp_path / config.output, config)
        assert Path(config.output).suffix in (".parquet", ".npy")


def test_a_tilde_in_a_value_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    words = ["data.path=~/a,~/b", "x=[~/c,~]", "~seed", "a=b~/c", "a=~b"]
    assert with_home_folders(words) == ["data.path=/home/me/a,/home/me/b", "x=[/home/me/c,/home/me]", *words[2:]]
    assert composed_embedding(*with_home_folders(["data.path=~/photos"])).data.path == "/home/me/photos"


def test_the_file_contains_the_result_of_embed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "x.parquet"
    words = [*NETWORK, *FEW, "n_last_blocks=2", "batch_size_per_device=4"]
    write_features(composed_embedding(*words, output=output), overrides=words)
    want = embed(
        BuiltinData(train_images=12, val_images=5, num_workers=0),
        "untrained:vit_micro",
        image_size=32,
        n_last_blocks=2,
        batch_size=4,
        feature_cache=None,
        accelerator="cpu",
    )
    table = pq.read_table(output)
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), want.features)
    assert table["name"].to_pylist() == want.names
    assert capsys.readouterr().out == f"17 images, 128 features each: {output}\n"


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "dino_lightning", "embed", *map(str, words), "trainer.accelerator=cpu"]


def test_exit_status_is_2_and_nothing_is_written(tmp_path: Path) -> None:
    words = ["--multirun", "checkpoint=a,b", "data=builtin", "output=x.npy"]
    done = run_program("dino_lightning", "embed", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "dino embed: --multirun: dino embed writes one file; run it once for each.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_and_repeated_command_writes_the_same_file(tmp_path: Path) -> None:
    data = ["data=builtin", "data.train_images=3500", "data.val_images=50", "data.num_workers=1"]
    network = ["checkpoint=untrained:vit_micro", "image_size=16"]
    subprocess.run(command(*network, *data, "output=whole.npy", "feature_cache=null"), cwd=tmp_path, check=True)
    words = command(*network, *data, "output=x.npy", "feature_cache=cache")
    killed = subprocess.Popen(words, cwd=tmp_path)
    blocks = tmp_path / "cache"
    while killed.poll() is None and not list(blocks.rglob("*.safetensors")):
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "x.npy").exists()
    before = {path: path.stat().st_mtime_ns for path in blocks.rglob("*.safetensors")}
    assert 1 <= len(before) < 5
    subprocess.run(words, cwd=tmp_path, check=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "cached blocks were computed again"
    for ending in ("npy", "csv"):
        assert (tmp_path / f"x.{ending}").read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()


@pytest.mark.slow
def test_two_processes_write_the_same_file(tmp_path: Path) -> None:
    data = ["data=builtin", "data.train_images=2100", "data.val_images=30", "data.num_workers=1", "feature_cache=null"]
    for devices in (1, 2):
        words = command(*NETWORK, *data, f"output={devices}.parquet", f"trainer.devices={devices}", "cpu_threads=1")
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.count("2130 images, 64 features each") == 1
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()
