"""Each kind of collapse raises its alarm; a healthy run of the same length raises none."""

import csv
import io
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from collapse_cases import BATCH, RecordedMetrics, byol, dino, fit, images
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from slow_params import first

from dino_lightning.config import CollapseConfig
from dino_lightning.losses.cross_view import SoftmaxParams
from dino_lightning.methods.base import Method
from dino_lightning.methods.collapse import CONSTANT, ONE_PROTOTYPE, effective_rank
from dino_lightning.methods.collapse_signals import log_feature_statistics, log_output_statistics
from dino_lightning.methods.feature_buffer import FeatureBuffer
from dino_lightning.methods.metrics_buffer import StepMetrics
from dino_lightning.models.factored_logits import FactoredLogits
from dino_lightning.runtime.collectives import leave_group
from dino_lightning.training.callbacks.collapse_alarm import CollapseAlarm
from dino_lightning.training.callbacks.progress import RunProgress
from dino_lightning.training.callbacks.throughput import Throughput

HOT = {"teacher_temperature": 0.2, "teacher_temperature_start": 0.2}
NO_PREDICTOR = {"predictor": False, "head_batch_norm": False, "teacher_update": "copy_each_step"}
AFTER = 13
"""10 % of 128 steps."""


def alarm(**config: Any) -> CollapseAlarm:
    return CollapseAlarm(CollapseConfig(**config))


@pytest.mark.parametrize(
    ("method", "names", "change"),
    first(
        [
            (lambda: dino(centering="none"), ["one prototype"], "set method.centering=center (now none)"),
            (lambda: dino(**HOT), ["uniform"], "lower method.teacher_temperature to 0.04 (now 0.2)"),
            # Its output changes with time, but is always the same for all images.
            (
                lambda: dino(teacher_update="copy_each_step"),
                ["one prototype", "constant"],
                "set method.teacher_update=ema (now copy_each_step)",
            ),
            (
                lambda: byol(**NO_PREDICTOR),
                ["alike"],
                "set method.predictor=true (now false); set method.head_batch_norm=true (now false); "
                "set method.teacher_update=ema (now copy_each_step)",
            ),
        ]
    ),
    ids=["no centering", "no sharpening", "no momentum", "BYOL without predictor"],
)
def test_each_collapse_is_named(method: Any, names: list[str], change: str, capsys: pytest.CaptureFixture[str]) -> None:
    watch = alarm()
    fit(method(), watch, steps=80)
    assert next(iter(watch.first_steps)) in names
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Collapse")]
    assert len(lines) == len(watch.first_steps), "once for each kind"
    for line, (name, step) in zip(lines, watch.first_steps.items(), strict=True):
        assert line.startswith(f"Collapse at step {step}, {name}: ")
    assert change in lines[0]
    assert watch.verdict == ", ".join(f"{name} at step {step}" for name, step in watch.first_steps.items())


@pytest.mark.parametrize(
    "method", first([dino, byol, lambda: dino(centering="sinkhorn")]), ids=["dino", "byol", "sinkhorn"]
)
def test_a_healthy_run_raises_no_alarm(method: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch = alarm()
    fit(method(), watch, folder=tmp_path, steps=80)
    assert watch.verdict is None
    assert "Collapse" not in capsys.readouterr().err
    assert set(column(tmp_path, "collapse/alarm")) == {0.0}


def column(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_the_log_has_the_alarm_and_the_signals_of_epochs(tmp_path: Path) -> None:
    watch = alarm(patience=4, after="20it")
    fit(dino(centering="none"), watch, folder=tmp_path, steps=48)
    assert watch.first_steps == {"one prototype": 23}
    assert column(tmp_path, "collapse/alarm") == [0.0] * 24 + [1.0] * 24
    assert len(column(tmp_path, "collapse/effective_rank")) == 3
    # Each covers an epoch; the first epoch contains healthy steps.
    first, _, last = column(tmp_path, "collapse/dead_prototypes")
    assert first < last == pytest.approx(31 / 32)
    assert watch._effective_rank == pytest.approx(column(tmp_path, "collapse/effective_rank")[-1], rel=1e-6)


def test_byol_logs_feature_statistics_only(tmp_path: Path) -> None:
    fit(byol(), alarm(), folder=tmp_path, steps=16)
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {name for name in header if name.startswith("collapse/")} == {
        f"collapse/{name}" for name in ("alarm", "effective_rank", "feature_std")
    }


def test_stop_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    watch = alarm(stop=True)
    trainer = fit(dino(centering="none"), watch)
    assert watch.first_steps == {"one prototype": AFTER + 9}
    # Known when the next step starts, so that one is the last.
    assert trainer.global_step == AFTER + 11
    assert "The run ends here (callbacks.collapse.stop=true)" in capsys.readouterr().err


@pytest.mark.slow
def test_there_is_no_diagnosis_before_the_warm_up() -> None:
    watch = alarm(after="100%")
    fit(dino(centering="none"), watch, steps=32)
    assert watch.verdict is None
    long = alarm(patience=200)
    fit(dino(centering="none"), long, steps=32)
    assert long.verdict is None


def test_an_alarm_restores_the_method() -> None:
    method = dino()
    fit(method, alarm(), steps=16)
    assert (method.metric_listeners, method.feature_buffer) == ([], None)

    def fail(reading: StepMetrics) -> None:
        raise KeyError

    method = dino()
    method.metric_listeners.append(fail)
    with pytest.raises(KeyError):
        fit(method, alarm(), steps=16)
    assert (method.metric_listeners, method.feature_buffer) == ([fail], None)


def test_a_resumed_run_continues_with_its_rows(tmp_path: Path) -> None:
    """Interrupted at the end of an epoch, in the middle of the rows that lead to the alarm."""
    whole, resumed = (alarm(after="10it", stop=True) for _ in range(2))
    every = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(dino(centering="none"), whole, every, steps=32, enable_checkpointing=True)
    assert list(whole.first_steps.values()) < [26], "else the rows after step 16 were enough"
    fit(dino(centering="none"), resumed, steps=32, resume=tmp_path / "step=16.ckpt")
    assert resumed.first_steps == whole.first_steps
    assert resumed._rows == whole._rows
    third = alarm()
    third.load_state_dict(resumed.state_dict())
    assert third.state_dict() == whole.state_dict()
    assert third.kind is ONE_PROTOTYPE


def test_one_odd_row_neither_raises_nor_ends_an_alarm() -> None:
    """The mean counts: four rows without information, and one with much."""

    def see(watch: CollapseAlarm, rows: list[float]) -> list[bool]:
        seen = []
        for step, information in enumerate(rows):
            signals = {"mean_output_entropy": 2.0, "teacher_entropy": 2.0 - information, "kl_to_uniform": 2.0}
            values = {f"collapse/{name}": value for name, value in signals.items()}
            watch._on_metrics(trainer, method, StepMetrics(step, 0, 8, True, values=values))
            seen.append(watch.kind is CONSTANT)
        return seen

    method = dino()
    trainer = fit(method, steps=16)
    method.feature_buffer = FeatureBuffer()
    assert see(alarm(after="0it", patience=5), [0, 0, 0, 0, 1, 0, 0, 0, 0]) == [False] * 9
    assert see(alarm(after="0it", patience=5), [0, 0, 0, 0, 0.2, 0, 0.1, 0]) == [False] * 4 + [True, True, False, False]


def test_the_warning_appears_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich passes output to stderr on to the console of the progress bar."""
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    bar = RunProgress(Throughput())
    bar.console = Console(file=screen, force_terminal=True, width=400)
    watch = alarm()

    class Opened(CollapseAlarm):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            bar._open(trainer)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            bar.on_train_end(trainer, pl_module)

    watch = Opened(watch.config)
    fit(dino(centering="none"), watch, steps=48)
    lines = screen.getvalue().split("\n")
    (line,) = [line for line in lines if "Collapse at step" in line]
    _, erased, sentence = line.rpartition("\x1b[2K")
    assert erased, "the bar was erased before"
    assert sentence.startswith("Collapse at step")
    assert sentence.rstrip().endswith("docs/collapse.md.")


def _halves(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.rand(8, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    features = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    part = slice(None) if rank < 0 else slice(4 * rank, 4 * rank + 4)
    return student[part], teacher[part], features[part]


def _signals(rank: int) -> dict[str, float]:
    student, teacher, features = _halves(rank)
    eye, metrics = torch.eye(6, dtype=torch.float64), RecordedMetrics()
    log_output_statistics(
        metrics, FactoredLogits(student, eye), FactoredLogits(teacher, eye), SoftmaxParams(0.1, 0.06, eye[:1])
    )
    log_feature_statistics(metrics, features)
    rank_of_features = metrics.feature_buffer.take_effective_rank()
    assert rank_of_features is not None
    return {**{name: value.item() for name, value in metrics.recorded.items()}, "effective_rank": rank_of_features}


def _rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ["LOCAL_RANK"] = str(rank)
    watch, method = alarm(stop=True), dino(centering="none")
    two: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    trainer = fit(method, watch, data=images(16, seed=rank), folder=Path(folder), **two)
    result = {"state": watch.state_dict(), "steps": trainer.global_step, "signals": _signals(rank)}
    torch.save(result, f"{folder}/{rank}.pt")
    leave_group()


@pytest.mark.slow
def test_two_ranks_have_the_same_signals_and_stop_together(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_rank, args=(port, str(tmp_path)), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert ranks[0] == ranks[1], "bit-identical, though their images differ"
    assert list(ranks[0]["state"]["first_steps"]) == ["one prototype"]
    assert ranks[0]["steps"] < 128
    assert capfd.readouterr().err.count("Collapse at step") == 1
    whole, own = _signals(-1), _signals(0)
    signals = ranks[0]["signals"]
    for name in ("teacher_entropy", "teacher_student_kl", "mean_output_entropy", "kl_to_uniform", "effective_rank"):
        assert signals[name] == pytest.approx(whole[name], rel=1e-10), name
        assert own[name] != pytest.approx(whole[name], rel=1e-3), name
    # The spread is the mean over ranks.
    assert signals["feature_std"] == pytest.approx((own["feature_std"] + _signals(1)["feature_std"]) / 2, rel=1e-12)
    assert whole["effective_rank"] == pytest.approx(effective_rank(_halves(-1)[2]).item())


@pytest.mark.slow
def test_accumulated_micro_batches_make_one_row(tmp_path: Path) -> None:
    halves = [[view.chunk(2)[part] for view in views] for views in images(16) for part in range(2)]
    watch = alarm()
    fit(dino(centering="none"), watch, data=halves, folder=tmp_path, steps=48, accumulate_grad_batches=2)
    assert len(column(tmp_path, "collapse/alarm")) == 48
    assert list(watch.first_steps) == ["one prototype"]


def test_every_method_has_a_feature_buffer() -> None:
    method: Method = dino()
    assert method.feature_buffer is None
    assert len(images(1)[0][0]) == BATCH
