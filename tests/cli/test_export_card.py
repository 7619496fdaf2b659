"""The model card that `dino export` writes."""

import json
from pathlib import Path

import pytest
from composing import SMALL, composed
from network_cases import FOLDERS_OF_TIMM

from dino_lightning.checkpoints import load_network
from dino_lightning.checkpoints.model_card import find_run_folder
from dino_lightning.cli.export import main
from dino_lightning.training.run import train


def write(checkpoint: Path, output: Path, *words: str, format: str) -> None:
    main([f"checkpoint={checkpoint}", f"output={output}", f"format={format}", *words])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "first"
    words = ["trainer.max_steps=2", "callbacks.pictures.enabled=false", "callbacks.knn.queries=16"]
    train(composed(*SMALL, *words, output_dir=output))
    return output


@FOLDERS_OF_TIMM
def test_a_card_has_the_results_and_settings_of_its_run(run: Path, tmp_path: Path) -> None:
    network = load_network(str(run))
    line = {"eval": "linear", "metric": "top1", "value": 41.25, "unit": "%", "checkpoint_digest": network.digest}
    others = line | {"value": 99.0, "checkpoint_digest": "0" * 16}
    (run.parent / "eval-linear").mkdir()
    text = "\n".join([json.dumps(line), json.dumps(others), '{"cut of'])
    (run.parent / "eval-linear" / "results.jsonl").write_text(text)
    write(run, tmp_path / "network", format="timm")
    card = (tmp_path / "network" / "README.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert f"| k-NN top-1 (%) | {summary['knn_top1']} |" in card
    assert "| linear: top1 | 41.25 % |" in card
    assert "99 %" not in card
    assert "with dino-lightning (method `dino`)" in card
    assert "# license: choose one" in card
    assert "teacher_momentum: " in card
    assert str(run.parent) not in card
    assert load_network(str(tmp_path / "network")).digest == network.digest


@FOLDERS_OF_TIMM
def test_the_card_of_the_student_has_no_results_of_the_teacher(run: Path, tmp_path: Path) -> None:
    write(run, tmp_path / "network", "checkpoint_key=student", format="timm")
    card = (tmp_path / "network" / "README.md").read_text()
    assert "k-NN" not in card
    assert "| seed | 0 |" in card


def test_only_folders_of_our_runs_count_as_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs also write `config.yaml`, and timm's weights do not belong to the working directory."""
    weights = tmp_path / "weights.pth"
    weights.touch()
    for text in ("method: dino\nstudent: {arch: vit_small}", "- 1", "a: [", "method: {}\nbackbone: 1"):
        (tmp_path / "config.yaml").write_text(text)
        assert find_run_folder(str(weights)) is None
    (tmp_path / "config.yaml").write_text("method: {}\nbackbone: {}")
    assert find_run_folder(str(weights)) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert find_run_folder("timm:vit_small_patch16_224.dino") is None
