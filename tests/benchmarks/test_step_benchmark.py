"""The benchmark of the training step: a real run of our side, and the evaluation of measurements."""

import json
from contextlib import nullcontext
from importlib.metadata import version
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
import ranks  # noqa: F401  # preloads libraries in the fork server
import step
import tiny
import torch
from step_batches import Setting, TimedBatches
from step_report import figures
from step_sides import configured, serve
from step_turns import Measured, OutOfMemoryError, measure

from dino_lightning.config import TimmConfig, ViTConfig

MEASURED = Measured(
    seconds={"ours": [2.0, 4.0, 3.0], "original": [4.0, 5.0, 4.0]},
    memory={
        "ours": {"resident": 300.0, "over_start": 100.0},
        "original": {"resident": 400.0, "over_start": 250.0},
    },
    flops=2e9,
    matrix_rate=4e9,
)


def test_ours_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Uses the fork server, whose processes have the libraries already; `spawn` would import them again."""
    context = torch.multiprocessing.get_context("forkserver")
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda _: context)
    arguments = "--device cpu --threads 1 --batch 1 --prototypes 64 --locals 1 --steps 1 --pairs 2 --warmup 1 --json"
    step.main([*arguments.split(), "--set", "backbone.depth=1"])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["config"]["backbone"] == "vit_tiny"
    assert row["pairs"] == 2
    memory = row["memory_mb"]["ours"]
    assert 0 < memory["over_start"] < memory["resident"]
    assert row["utilization"]["ours"] > 0
    assert 0 < row["gflop_per_image"] < 4  # one block of twelve
    assert {"commit", "torch", "device", "command"} <= row.keys()
    assert "time_ratio" not in row


def test_the_time_includes_complete_steps():
    parent_pipe, child_pipe = Pipe()
    record, answers = tiny.Record(), []
    setting = Setting(max_steps=5)

    def command() -> None:
        assert parent_pipe.recv()[0] == "ready"
        for steps in (2, 3):
            parent_pipe.send(steps)
            kind, content = parent_pipe.recv()
            # The loop waits for the next command, so all steps done by now were timed.
            answers.append((kind, len(record.losses), content["seconds"] > 0))
        parent_pipe.send("stop")

    batches = TimedBatches(child_pipe, setting)
    batches.source = tiny.batches(5)
    thread = Thread(target=command)
    thread.start()
    with pytest.raises(EOFError):
        tiny.fit(tiny.dino(), batches, callbacks=[record])
    thread.join()
    assert answers == [("done", 2, True), ("done", 5, True)]


def test_figures_of_a_cpu_are_relative():
    row = figures(MEASURED, Setting(device="cpu", batch=8))
    assert row["ratios"] == [0.5, 0.8, 0.75]
    assert (row["time_ratio"], row["time_ratio_min"], row["time_ratio_max"]) == (0.75, 0.5, 0.8)
    assert row["memory_ratio"] == 0.75
    assert row["memory_over_start_ratio"] == 0.4
    # 8 images in 3 seconds with 2 GFLOP each, relative to 4 GFLOP/s.
    assert row["utilization"] == {"ours": round(8 / 3 / 2, 4), "original": 1.0}
    assert not {"images_per_second", "matrix_tflops"} & row.keys()


def test_figures_of_a_gpu():
    memory = {"ours": {"allocated": 30.0}, "original": {"allocated": 50.0}}
    row = figures(Measured(MEASURED.seconds, memory, 2e9, 4e12), Setting(device="cuda", batch=8))
    assert row["images_per_second"] == {"ours": 2.7, "original": 2.0}
    assert row["memory_ratio"] == 0.6
    assert row["matrix_tflops"] == 4.0


def test_figures_without_memory_for_one_side():
    alone = Measured({"ours": [2.0]}, {"ours": {"resident": 1.0, "over_start": 0.5}}, 2e9, 4e9, ["original"], True)
    row = figures(alone, Setting(device="cpu", batch=8))
    assert row["out_of_memory"] == ["original"]
    assert "time_ratio" not in row
    step.show([row | {"config": step.described(Setting(), [])["config"], "pairs": 1}])


def test_both_sides_get_the_same_setting(tmp_path: Path):
    setting = Setting("vit_base", patch=8, batch=3, prototypes=99, local_crops=4, precision="bf16")
    config = configured(setting, output_dir=tmp_path)
    assert isinstance(config.backbone, ViTConfig)
    assert (config.backbone.width, config.backbone.patch_size, config.backbone.drop_path_rate) == (768, 8, 0.1)
    assert (config.data.batch_size_per_device, config.method.out_dim, config.crops.local_count) == (3, 99, 4)
    assert (config.trainer.precision, config.optim.lr, config.optim.clip_grad) == ("bf16-mixed", 0.0005, 3.0)
    assert config.method.freeze_last_layer == "0ep"
    convolutional = configured(Setting("resnet50", precision="tf32"), output_dir=tmp_path)
    assert isinstance(convolutional.backbone, TimmConfig)
    assert (convolutional.optim.momentum, convolutional.optim.lr) == (0.9, 0.03)
    assert convolutional.compute.matmul_precision == "high"


class Counting:
    """A fake of the two processes: a step takes one second (ours) or two (original)."""

    commands: ClassVar[list[tuple[str, int | str]]] = []

    def __init__(self, name: str) -> None:
        self.name, self.facts = name, {"flops": 7.0} if name == "ours" else {}

    def run(self, command: int | str) -> Any:
        self.commands.append((self.name, command))
        if command == "matrix rate":
            return 9.0
        return {"seconds": command * (1 if self.name == "ours" else 2), "memory": {"resident": 1.0}}


def test_pairs_alternate(monkeypatch: pytest.MonkeyPatch):
    sides = nullcontext([Counting("ours"), Counting("original")])
    monkeypatch.setattr("step_turns.sides", lambda *_: sides)
    measured = measure(Setting(), "checkout", pairs=2, steps=5, warmup=3)
    warmup, turns = Counting.commands[:2], Counting.commands[2:]
    assert sorted(warmup) == [("original", 3), ("ours", 3)]
    order = ["original", "ours", "ours", "original"]
    assert turns == [*((name, 5) for name in order), ("ours", "matrix rate")]
    assert measured.seconds == {"ours": [1, 1], "original": [2, 2]}  # per step
    assert (measured.flops, measured.matrix_rate) == (7.0, 9.0)


def test_without_memory_for_both_sides_each_runs_alone(monkeypatch: pytest.MonkeyPatch):
    def take_turns(names: tuple[str, ...], *_: object, **__: object) -> Measured:
        if "original" in names:
            raise OutOfMemoryError("original")
        return Measured({"ours": [2.0]}, {"ours": {"resident": 1.0}}, 2e9, 4e9)

    monkeypatch.setattr("step_turns.take_turns", take_turns)
    measured = measure(Setting(), "checkout", pairs=1, steps=1, warmup=1)
    assert (measured.seconds, measured.no_memory, measured.apart) == ({"ours": [2.0]}, ["original"], True)


@pytest.mark.parametrize(
    ("setting", "kind", "message"),
    [
        (Setting("vit_tiny", batch=10**10, prototypes=64), "out of memory", "can't allocate memory"),
        (Setting("vit_tiny", overrides=("compute.nonsense=1",)), "failed", "nonsense"),
    ],
)
def test_a_side_reports_why_it_ended(setting: Setting, kind: str, message: str):
    parent_pipe, child_pipe = Pipe()
    serve("ours", setting, None, child_pipe)
    reported_kind, content = parent_pipe.recv()
    assert reported_kind == kind
    assert message in content


def test_a_folder_is_long_enough_for_one_epoch(tmp_path: Path):
    for name in ("a/1.jpg", "b/2.png", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    with step.enlarged(tmp_path, images=5) as folder:
        files = sorted(folder.rglob("*.*"))
        assert [file.parent.name for file in files] == ["a", "a", "a", "b", "b"]
        assert {file.read_text() for file in files} == {"a/1.jpg", "b/2.png"}


def test_recorded_commands_have_no_paths():
    arguments = ["--original", "/home/me/dino", "--data=/mine", "--set", "compute.compile=true"]
    assert step.without_paths(arguments) == ["--original", "DIR", "--data=IMAGES", "--set", "compute.compile=true"]


def test_sweeps_begin_with_the_command_line():
    rows = list(step.settings(step.parse(["--device", "cpu", "--sweep", "quick", "--threads", "1", "--patch", "8"])))
    assert rows == [
        Setting("vit_tiny", patch=8, batch=2, prototypes=256, local_crops=1, threads=1),
        Setting("resnet50", patch=8, batch=1, prototypes=256, local_crops=1, threads=1),
    ]


def test_recorded_rows_name_the_machine():
    row = step.described(Setting(threads=2), ["--json"])
    assert row["torch"] == version("torch")
    assert row["device"].startswith("2 threads of ")
