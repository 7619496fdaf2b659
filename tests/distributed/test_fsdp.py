"""FSDP: checkpoints equal those of one process, and a complete run works."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks_worker
import tiny
import torch
from composing import SMALL, composed
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from dino_lightning.training.run import train as train_in_process

PROJECT = Path(__file__).parents[2]
EXACT = {"rtol": 1e-9, "atol": 1e-12}
"""Float64: only the order of sums differs."""

UNEVEN = [
    "data.val_images=25",
    "data.batch_size_per_device=8",
    "callbacks.knn.batch_size_per_device=12",
    "trainer.precision=32",
]
"""13 and 12 queries on two ranks: two batches and one."""

pytestmark = pytest.mark.slow


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.mark.slow
def test_a_run_of_one_process_is_resumed_by_two_ranks(tmp_path: Path) -> None:
    module, batches = ranks_worker.module_and_batches()
    module.batch_size_per_device = 8
    checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    tiny.fit(module, batches, callbacks=[checkpoints], max_epochs=ranks_worker.EPOCHS, enable_checkpointing=True)
    (tmp_path / "epoch=0.ckpt").rename(tmp_path / "start.ckpt")
    frozen = load(tmp_path / "start.ckpt")["optimizer_states"][0]["state"]
    ranks_worker.launch(tmp_path, "fsdp")

    ours, expected = load(tmp_path / "fsdp.ckpt"), load(tmp_path / "epoch=1.ckpt")
    assert ours["global_step"] == expected["global_step"] == 10
    assert ours["state_dict"].keys() == expected["state_dict"].keys()
    for name, weight in ours["state_dict"].items():
        torch.testing.assert_close(weight, expected["state_dict"][name], **EXACT, msg=name)
    (state,), (expected_state,) = ours["optimizer_states"], expected["optimizer_states"]
    assert state["param_groups"] == expected_state["param_groups"]
    assert state["state"].keys() == expected_state["state"].keys()
    assert len(frozen) == len(state["state"]) - 2, "the prototypes' two parameters had no state yet"
    for index, moments in state["state"].items():
        for name, value in moments.items():
            torch.testing.assert_close(value, expected_state["state"][index][name], **EXACT)


def train(output: Path, *overrides: str) -> dict[str, Any]:
    """Run `python train.py` on two ranks; returns its summary."""
    options = [*SMALL, *UNEVEN, "trainer.devices=2", "trainer.strategy=fsdp", "cpu_threads=1", *overrides]
    command = [sys.executable, str(PROJECT / "train.py"), *options, f"output_dir={output}"]
    subprocess.run(command, check=True, timeout=120, cwd=output.parent)
    return json.loads((output / "summary.json").read_text())


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that was resumed to twelve."""
    folder = tmp_path_factory.mktemp("fsdp") / "run"
    assert train(folder, "trainer.max_steps=6", "callbacks.pictures.every_n_epochs=1")["steps"] == 6
    assert train(folder, "resume=true", "callbacks.pictures.every_n_epochs=1")["steps"] == 12
    return folder


def test_output_folder(output: Path) -> None:
    names = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    expected = {"config.yaml", "metrics.csv", "summary.json", "report.html", "teacher.safetensors"}
    expected |= {f"checkpoints/{name}.ckpt" for name in ("last", "last-1", "best_knn")}
    drawn = ("attention", "pca", "neighbors")
    pictures = ("crops", *drawn, *(f"{name}_epoch0001" for name in drawn))
    assert names == expected | {f"pictures/{name}.png" for name in pictures}


def test_export_contains_the_complete_teacher(output: Path) -> None:
    weights = load(output / "checkpoints" / "last.ckpt")["state_dict"]
    exported = load_file(output / "teacher.safetensors")
    assert {f"teacher.backbone.{name}" for name in exported} == {
        n for n in weights if n.startswith("teacher.backbone.")
    }
    assert all(torch.equal(weights[f"teacher.backbone.{name}"], weight) for name, weight in exported.items())


def test_knn_of_the_untrained_network_is_that_of_one_process(output: Path, tmp_path: Path) -> None:
    train_in_process(
        composed(*SMALL, *UNEVEN, "trainer.max_steps=1", "callbacks.pictures.enabled=false", output_dir=tmp_path)
    )
    alone, ranks = (json.loads((path / "summary.json").read_text()) for path in (tmp_path, output))
    for key in ("knn_top1_untrained", "knn_top1_pixels"):
        assert ranks[key] == alone[key]
