"""Metrics of a step reach the loggers one step later, and none is lost; a loss that is not finite ends the run."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from device_waits import EnterBetweenBatches, waits
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from ranks import on_ranks
from torch.utils.data import DataLoader

from dino_lightning.methods.metrics_buffer import MetricsBuffer, StepMetrics
from dino_lightning.runtime.collectives import leave_group

NAN_AT = 2
"""The optimizer step with a broken image."""


def fit(module: Any, data: tiny.Batches, *callbacks: Callback, folder: Path, **trainer: Any) -> tiny.Record:
    """Like `tiny.fit`, with `metrics.csv` in `folder`."""
    record = tiny.Record()
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "precision": "64-true"}
    lengths: dict[str, Any] = {"max_epochs": 1, "log_every_n_steps": 1, "enable_checkpointing": False, "devices": 1}
    logger = CSVLogger(folder, name="", version="")
    options = {**quiet, **lengths, "accelerator": "cpu", "logger": logger, **trainer}
    loader = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    L.Trainer(**options, callbacks=[record, *callbacks]).fit(module, loader)
    return record


def rows(folder: Path, *, having: str = "train/loss") -> list[dict[str, str]]:
    if not (folder / "metrics.csv").exists():
        return []
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get(having)]


def losses(folder: Path) -> dict[int, float]:
    found = [(int(row["step"]), float(row["train/loss"])) for row in rows(folder)]
    assert len({step for step, _ in found}) == len(found), "a step has two rows"
    return dict(found)


def broken(data: tiny.Batches, *, at: int = NAN_AT) -> tiny.Batches:
    data[at][0][0] = float("nan")
    return data


# ---------------------------------------------------------------------------------------------------- readings alone


def test_metrics_arrive_in_order_with_the_values_of_their_step() -> None:
    readings, signal, seen = MetricsBuffer(), torch.tensor(3.0), []
    for step in range(3):
        loss = torch.tensor(step + 0.5, requires_grad=True)
        readings.begin(step=step, epoch=0, images=1, logged=True)
        readings.record("signal", signal)
        readings.start_reduce(loss * 2)
        readings.record("speed", step * 10.0)
        signal.add_(1)
    readings.flush(seen.append)
    readings.flush(seen.append)
    assert [(r.step, r.loss, r.values) for r in seen] == [
        (step, 2 * step + 1.0, {"signal": 3.0 + step, "speed": step * 10.0}) for step in range(3)
    ]
    assert readings.latest == 5.0


def test_only_the_loss_is_recorded_outside_logging_steps() -> None:
    readings, seen = MetricsBuffer(), []
    readings.begin(step=0, epoch=0, images=1, logged=False)
    readings.record("signal", torch.tensor(1.0))
    readings.start_reduce(torch.tensor(2.0))
    readings.record("speed", 3.0)
    readings.flush(seen.append)
    assert (seen[0].loss, seen[0].values) == (2.0, {})


def test_float64_and_half_precision_losses() -> None:
    readings, seen = MetricsBuffer(), []
    for dtype in (torch.float64, torch.bfloat16):
        readings.begin(step=0, epoch=0, images=1, logged=True)
        readings.record("single", torch.tensor(0.25))
        readings.start_reduce(torch.tensor(1 / 3, dtype=dtype))
    readings.flush(seen.append)
    assert [r.loss for r in seen] == [1 / 3, torch.tensor(1 / 3).bfloat16().item()]
    assert [r.values["single"] for r in seen] == [0.25, 0.25]


def test_a_scalar_after_the_loss_is_refused() -> None:
    readings = MetricsBuffer()
    readings.begin(step=0, epoch=0, images=1, logged=True)
    readings.start_reduce(torch.tensor(1.0))
    with pytest.raises(AssertionError, match="late: record device scalars before"):
        readings.record("late", torch.tensor(1.0))


def test_metrics_are_offered_again_after_an_error_and_count_once() -> None:
    readings, seen = MetricsBuffer(), []

    def use(reading: StepMetrics) -> None:
        seen.append(reading.step)
        if seen.count(1) == 1 and reading.step == 1:
            raise FloatingPointError

    for step in range(3):
        readings.begin(step=step, epoch=0, images=step + 1, logged=False)
        readings.start_reduce(torch.tensor(float(step)))
    with pytest.raises(FloatingPointError):
        readings.flush(use)
    assert readings.latest == 0.0
    readings.flush(use)
    assert seen == [0, 1, 1, 2]
    assert readings.pop_epoch_mean() == pytest.approx((0 * 1 + 1 * 2 + 2 * 3) / 6)
    assert readings.pop_epoch_mean() is None


def send(readings: MetricsBuffer, loss: float = 1.0) -> None:
    readings.begin(step=0, epoch=0, images=1, logged=True)
    readings.start_reduce(torch.tensor(loss))


def test_a_request_is_sent_once_and_remains_until_it_is_met() -> None:
    readings = MetricsBuffer()
    readings.request_stop = True
    send(readings)
    assert (readings.stop_requested, readings.request_stop) == (False, False), "it has not arrived yet"
    readings.wait()
    assert (readings.stop_requested, readings.save_requested) == (True, False)
    readings.request_save = True
    for _ in range(2):
        send(readings)
        readings.wait()
        assert readings.stop_requested
        assert readings.save_requested
    readings.stop_requested = readings.save_requested = False
    send(readings)
    readings.wait()
    assert not readings.stop_requested
    assert not readings.save_requested


def test_a_failed_gradient_is_sent_with_the_next_loss() -> None:
    readings = MetricsBuffer()
    for failed, expected in ((torch.zeros(()), False), (torch.tensor(True), True), (None, True)):
        readings.gradient_failed = failed
        send(readings)
        assert readings.gradient_failed is None
        readings.wait()
        assert readings.gradients_failed is expected


def test_drain_hands_over_only_metrics_that_have_arrived() -> None:
    readings, seen = MetricsBuffer(), []
    send(readings, 1.5)
    readings.drain(seen.append)
    assert seen == [], "it has not arrived yet"
    readings.wait()
    assert readings.latest is None
    readings.record("speed", 3.0)
    send(readings, 2.5)
    readings.drain(seen.append)
    assert [(r.loss, r.local_loss, r.values) for r in seen] == [(1.5, 1.5, {"speed": 3.0})]
    assert readings.latest == 1.5


def test_the_mean_of_an_epoch_is_saved_and_restored() -> None:
    first, second = MetricsBuffer(), MetricsBuffer()
    for readings, losses in ((first, (1.0, 2.0)), (second, (6.0,))):
        if readings is second:
            second.load_state_dict(first.state_dict())
        for loss in losses:
            send(readings, loss)
        readings.flush(lambda reading: None)
    assert second.pop_epoch_mean() == pytest.approx(3.0)


# ------------------------------------------------------------------------------------------------------ rows of a fit


class Written(Callback):
    """The steps whose rows are in the file when each micro-batch ends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, []

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(list(losses(self.folder)))


def test_a_row_is_written_one_step_later_with_its_own_values(tmp_path: Path) -> None:
    module, written = tiny.dino(), Written(tmp_path)
    record = fit(module, tiny.batches(4), written, folder=tmp_path, max_epochs=2)
    assert written.seen[:4] == [[], [0], [0, 1], [0, 1, 2]]
    assert written.seen[4] == [0, 1, 2, 3], "the end of the epoch writes all rows"
    assert losses(tmp_path) == pytest.approx(dict(enumerate(record.losses)), rel=1e-12)
    for row, rate, decay in zip(rows(tmp_path), record.rates, record.decays, strict=True):
        assert float(row["schedule/lr"]) == rate
        assert float(row["schedule/weight_decay"]) == decay[0]
        assert int(row["epoch"]) == int(row["step"]) // 4
    # The norm of the center that the loss used: before the update of the step.
    norms = [float(row["collapse/center_norm"]) for row in rows(tmp_path)]
    assert norms == pytest.approx([0.0] + [center.norm().item() for center in record.centers[:-1]], rel=1e-9)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_only_every_nth_step_has_a_row(tmp_path: Path, accumulated: int) -> None:
    module = tiny.dino(batch_size=8 // accumulated)
    data = tiny.split(tiny.batches(5), parts=accumulated)
    options: dict[str, Any] = {"log_every_n_steps": 2, "accumulate_grad_batches": accumulated}
    record = fit(module, data, folder=tmp_path, max_epochs=2, **options)
    last_of_steps = record.losses[accumulated - 1 :: accumulated]
    assert losses(tmp_path) == pytest.approx({step: last_of_steps[step] for step in (1, 3, 5, 7, 9)}, rel=1e-12)


def test_a_run_with_max_steps_writes_its_last_row(tmp_path: Path) -> None:
    record = fit(tiny.dino(), tiny.batches(5), folder=tmp_path, max_steps=3, max_epochs=5)
    assert losses(tmp_path) == pytest.approx(dict(enumerate(record.losses)), rel=1e-12)
    assert len(record.losses) == 3


class Stop(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = batch_idx == 2


def test_a_stopped_run_writes_its_last_loss(tmp_path: Path) -> None:
    """Also if `log_every_n_steps` does not include the step, like in Lightning."""
    record = fit(tiny.dino(), tiny.batches(5), Stop(), folder=tmp_path, log_every_n_steps=10)
    assert losses(tmp_path) == pytest.approx({2: record.losses[2]}, rel=1e-12)


@pytest.mark.parametrize("every", [1, 0])
def test_the_mean_of_an_epoch_is_over_all_its_images(tmp_path: Path, every: int) -> None:
    data = tiny.batches(3)
    data[-1] = [crop[:2] for crop in data[-1]]
    module = tiny.dino()
    record = fit(module, data, folder=tmp_path, max_epochs=2, log_every_n_steps=every)
    found = [(int(row["step"]), float(row["train/loss_epoch"])) for row in rows(tmp_path, having="train/loss_epoch")]
    halves = (record.losses[:3], record.losses[3:])
    means = [(8 * first + 8 * second + 2 * third) / 18 for first, second, third in halves]
    assert found == [(2, pytest.approx(means[0], rel=1e-6)), (5, pytest.approx(means[1], rel=1e-6))]
    assert module.trainer.callback_metrics["train/loss"].item() == pytest.approx(record.losses[-1], rel=1e-6)
    assert len(rows(tmp_path)) == (6 if every else 0)


def test_callbacks_can_monitor_both_losses(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "a", monitor="train/loss_epoch", save_on_train_epoch_end=True)
    last = ModelCheckpoint(tmp_path / "b", monitor="train/loss", save_top_k=1, every_n_train_steps=1)
    stop = EarlyStopping("train/loss_epoch", divergence_threshold=0.0)  # each loss is above it: ends the first epoch
    record = fit(
        tiny.dino(), tiny.batches(3), best, last, stop, folder=tmp_path, max_epochs=2, enable_checkpointing=True
    )
    assert len(record.losses) == 3
    assert best.best_model_score is not None
    assert best.best_model_score.item() == pytest.approx(sum(record.losses) / 3, rel=1e-6)
    assert last.best_model_score is not None
    assert last.best_model_score.item() == pytest.approx(min(record.losses), rel=1e-6)


# ------------------------------------------------------------------------------------------- a loss that is not finite


def test_no_checkpoint_is_written_after_a_nan(tmp_path: Path) -> None:
    kept = ModelCheckpoint(tmp_path / "kept", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    at_errors = OnExceptionCheckpoint(tmp_path / "errors")
    module = tiny.dino()
    with pytest.raises(FloatingPointError, match=rf"loss is nan at step {NAN_AT}.*optim\.lr"):
        fit(module, broken(tiny.batches(5)), kept, at_errors, folder=tmp_path / "rows", enable_checkpointing=True)
    assert {path.name for path in tmp_path.rglob("*.ckpt")} == {f"step={step}.ckpt" for step in range(1, NAN_AT + 1)}
    assert list(losses(tmp_path / "rows")) == list(range(NAN_AT))
    with pytest.raises(FloatingPointError):
        module.trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert not (tmp_path / "after.ckpt").exists()


@pytest.mark.parametrize("at", [2, 4])
def test_a_nan_ends_the_run_before_the_weights_are_used(tmp_path: Path, at: int) -> None:
    """In the next step, or before the callbacks at the end of the epoch."""

    class Evaluation(Callback):
        ran = False

        def on_train_epoch_end(self, *_: Any) -> None:
            self.ran = True

    evaluation = Evaluation()
    with pytest.raises(FloatingPointError, match=f"at step {at}:"):
        fit(tiny.dino(), broken(tiny.batches(5), at=at), evaluation, folder=tmp_path, log_every_n_steps=50)
    assert not evaluation.ran


def test_another_fit_starts_from_an_empty_buffer(tmp_path: Path) -> None:
    module = tiny.dino()
    weights = tiny.copy(module)
    with pytest.raises(FloatingPointError):
        fit(module, broken(tiny.batches(2), at=1), folder=tmp_path / "a")
    module.load_state_dict(weights)
    fit(module, tiny.batches(2), folder=tmp_path / "b")
    assert list(losses(tmp_path / "b")) == [0, 1]


def _rank(rank: int, folder: str) -> None:
    torch.manual_seed(0)
    module, data = tiny.dino(batch_size=4), tiny.batches(5)
    own = [[crop.chunk(2)[rank] for crop in crops] for crops in data]
    two: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    error, watch = "", EnterBetweenBatches(waits(), first=1, last=NAN_AT)
    try:
        fit(module, broken(own) if rank else own, watch, folder=Path(folder), **two)
    except FloatingPointError as raised:
        error = str(raised)
    state = {
        "error": error,
        "steps": module.global_step,
        "mean": module.metrics.pop_epoch_mean(),
        "waits": watch.result,
    }
    torch.save(state, Path(folder) / f"{rank}.pt")
    leave_group()


def test_one_rank_stops_all_in_the_same_step(tmp_path: Path) -> None:
    on_ranks(_rank, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for rank in ranks:
        assert f"the loss is nan at step {NAN_AT}:" in rank["error"]
        assert rank["steps"] == NAN_AT, "no weight changes"
        # Except the recorder of this test. A broadcast of Lightning from rank 0 would be among them.
        assert [wait for wait in rank["waits"] if "/tiny.py:" not in wait] == []
    assert ranks[0]["mean"] == ranks[1]["mean"] == pytest.approx(sum(losses(tmp_path).values()) / NAN_AT, rel=1e-9)
    assert list(losses(tmp_path)) == list(range(NAN_AT))
