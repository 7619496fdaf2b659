"""A step that is not finite moves nothing, and what follows is what the policy says."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import tiny_methods
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from nonfinite_cases import (
    BAD,
    STEPS,
    BadGradient,
    assert_equal,
    broken,
    callback,
    data,
    dino,
    files,
    fit,
    reference_states,
    rows,
)
from slow_params import first
from torch import Tensor

from dino_lightning.config import AdamWConfig, CollapseConfig, LARSConfig, OptimConfig, SGDConfig
from dino_lightning.methods import base
from dino_lightning.methods.metrics_buffer import StepMetrics
from dino_lightning.training.callbacks.collapse_alarm import CollapseAlarm
from dino_lightning.training.debug.step_dump import read_step

OPTIMS: dict[str, OptimConfig] = {
    "adamw": AdamWConfig(lr=0.032, lr_warmup="0ep"),
    "sgd": SGDConfig(lr=3.2, lr_warmup="0ep"),
    "lars": LARSConfig(lr=3.2, lr_warmup="0ep"),
}


# ------------------------------------------------------------------------------------------------------ left out


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("name", first(OPTIMS))
def test_a_skipped_step_changes_nothing(tmp_path: Path, name: str, accumulated: int) -> None:
    """To the last bit, against a loop that passes over it."""
    options: dict[str, Any] = {"optim": OPTIMS[name], "batch_size": 8 // accumulated}
    batches = data(parts=accumulated)
    at = accumulated * BAD  # the first micro-batch of its step
    ours = fit(
        dino(**options),
        broken(batches, at),
        callback(tmp_path, "skip"),
        folder=tmp_path,
        accumulate_grad_batches=accumulated,
    )
    expected = reference_states(dino(**options), batches, skipped={BAD}, accumulated=accumulated)
    for step, wanted in enumerate(expected):
        assert_equal(ours.states[(step + 1) * accumulated - 1], wanted, f"after step {step}")
    assert ours.steps[accumulated - 1 :: accumulated] == [1, 2, 3, 4, 5]
    assert any(not torch.equal(ours.states[-1][key], value) for key, value in ours.states[at - 1].items())


@pytest.mark.parametrize("name", first(OPTIMS))
def test_a_step_with_a_bad_gradient_changes_nothing(tmp_path: Path, name: str) -> None:
    batches = data()
    ours = fit(dino(optim=OPTIMS[name]), batches, callback(tmp_path, "skip"), BadGradient(BAD), folder=tmp_path)
    expected = reference_states(dino(optim=OPTIMS[name]), batches, skipped={BAD})
    for step, wanted in enumerate(expected):
        assert_equal(ours.states[step], wanted, f"after step {step}")
    assert files(tmp_path) == [f"step{BAD:06d}-rank0.pt"]
    assert read_step(tmp_path / "nonfinite" / files(tmp_path)[0])["what"] == f"a gradient is not finite at step {BAD}"


METHODS: dict[str, Any] = {
    "batch norms": lambda: dino(head_batch_norm=True),
    "sinkhorn": lambda: dino(centering="sinkhorn"),
    "patches": lambda: dino(patch_loss_weight=1.0, mask_p=1.0),
    "previous step": lambda: dino(teacher_update="previous_step"),
    "no clip": lambda: dino(optim=AdamWConfig(lr=0.032, lr_warmup="0ep", clip_grad=0.0)),
    **{name: lambda name=name: tiny_methods.build(name) for name in ("byol", "moco2", "moco3", "swav", "supervised")},
}


@pytest.mark.parametrize("cause", first(["gradient", "loss"]))
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow_after_first(5)
def test_a_skipped_step_changes_no_state_of_any_method(tmp_path: Path, name: str, cause: str) -> None:
    """Queues, centers, statistics of batch norms, moments and step counts included."""
    torch.manual_seed(4)
    module = METHODS[name]()
    batches: Any = broken(data(), BAD) if cause == "loss" else data()
    batches = tiny_methods.labeled(batches) if name == "supervised" else batches
    hooks = [BadGradient(BAD)] if cause == "gradient" else []
    ours = fit(module, batches, callback(tmp_path, "skip"), *hooks, folder=tmp_path)
    assert_equal(ours.states[BAD], ours.states[BAD - 1], "moved in the step that is left out")
    assert_equal(ours.optimizers[BAD], ours.optimizers[BAD - 1])
    assert all(tensor.isfinite().all() for tensor in ours.states[-1].values())
    assert any(not torch.equal(ours.states[-1][key], value) for key, value in ours.states[BAD].items())
    assert len(ours.states) == STEPS


def test_rows_and_epoch_mean_omit_skipped_steps(tmp_path: Path) -> None:
    watched: list[StepMetrics] = []
    module = dino()
    module.metric_listeners.append(watched.append)
    alarm = CollapseAlarm(CollapseConfig(after="0it", patience=1))
    fit(module, broken(data(), BAD), callback(tmp_path, "skip"), alarm, folder=tmp_path)
    found = rows(tmp_path)
    losses = {int(row["step"]): float(row["train/loss"]) for row in found if row["train/loss"]}
    assert list(losses) == [0, 1, 3, 4] == [reading.step for reading in watched]
    means = [float(row["train/loss_epoch"]) for row in found if row["train/loss_epoch"]]
    assert means == [pytest.approx(sum(losses.values()) / 4, rel=1e-6)]
    counts = {int(row["step"]): float(row["nonfinite/steps"]) for row in found if row["nonfinite/steps"]}
    assert counts == {0: 0, 1: 0, 2: 1, 3: 1, 4: 1}
    assert all(math.isfinite(float(value)) for row in found for value in row.values() if value)
    ranks = [float(row["collapse/effective_rank"]) for row in found if row.get("collapse/effective_rank")]
    assert ranks
    assert all(map(math.isfinite, ranks))


def test_too_many_skipped_steps_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits: dict[str, Any] = {"max_steps": 2, "max_saved": 1}
    with pytest.raises(
        FloatingPointError, match=r"loss is nan at step 4 after callbacks\.nonfinite\.max_steps=2 such steps"
    ):
        fit(dino(), broken(data(count=6), 0, 2, 4), callback(tmp_path, "skip", **limits), folder=tmp_path)
    assert files(tmp_path) == ["step000000-rank0.pt"], "callbacks.nonfinite.max_saved=1"
    said = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert [line.split(":")[1].strip() for line in said] == [f"the loss is nan at step {step}" for step in (0, 2)]
    assert "1 of at most 2" in said[0]
    assert "2 of at most 2" in said[1]


def test_the_count_is_saved_in_the_checkpoint(tmp_path: Path) -> None:
    kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(FloatingPointError, match="at step 3 after"):
        fit(
            dino(),
            broken(data(), 1, 3),
            callback(tmp_path, "skip", max_steps=1),
            kept,
            folder=tmp_path,
            enable_checkpointing=True,
        )
    again = callback(tmp_path, "skip", max_steps=1)
    module = dino().double()
    trainer = L.Trainer(
        accelerator="cpu",
        precision="64-true",
        max_epochs=1,
        logger=False,
        callbacks=[again],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    # This loader does not know its place: its first batch is that of step 3.
    loader = torch.utils.data.DataLoader(broken(data(), 0), batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(FloatingPointError, match="at step 3 after"):
        trainer.fit(module, loader, ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    assert again.count == 2


# ------------------------------------------------------------------------------------------------------------- stop


@pytest.mark.parametrize("cause", ["loss", "gradient"])
def test_policy_stop_leaves_the_weights_unchanged(tmp_path: Path, cause: str) -> None:
    module, hooks = dino(), [BadGradient(BAD)] if cause == "gradient" else []
    batches = broken(data(), BAD) if cause == "loss" else data()
    saved = rf"dino replay {tmp_path}/nonfinite/step{BAD:06d}-rank0\.pt"
    with pytest.raises(FloatingPointError, match=rf"at step {BAD}: lower optim\.lr.*{saved}"):
        fit(module, batches, callback(tmp_path, "stop"), *hooks, folder=tmp_path)
    expected = reference_states(dino(), data(), skipped=set())[BAD - 1]
    assert_equal(tiny.copy(module), expected)


@pytest.mark.parametrize("name", first(OPTIMS))
@pytest.mark.parametrize("last", [False, True])
def test_a_bad_gradient_is_skipped_on_the_device_without_waiting(
    tmp_path: Path, name: str, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the program learns of it with the loss of the step after, or at the end of the epoch."""
    monkeypatch.setattr(base, "is_asynchronous", lambda device: True)
    monkeypatch.setattr(base, "read_now", _must_not_be_called)
    at = STEPS - 1 if last else BAD
    module = dino(optim=OPTIMS[name])
    kept = ModelCheckpoint(tmp_path / "kept", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    with pytest.raises(FloatingPointError, match=f"a gradient is not finite at step {at}: lower optim.lr"):
        fit(
            module,
            data(),
            callback(tmp_path, "stop"),
            BadGradient(at),
            kept,
            folder=tmp_path,
            enable_checkpointing=True,
        )
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [f"step={i}.ckpt" for i in range(1, at + 1)]
    if name != "lars":
        expected = reference_states(dino(optim=OPTIMS[name]), data(), skipped={at})[at]
        ours = {key: value for key, value in tiny.copy(module).items() if key.startswith("student")}
        assert_equal(ours, {key: value for key, value in expected.items() if key in ours})


def _must_not_be_called(flag: Tensor) -> bool:
    raise AssertionError("the program would wait for the device")


# --------------------------------------------------------------------------------------------------------- rollback


def test_a_rollback_continues_from_the_previous_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, moments and center of the checkpoint; images and schedules of the steps that follow."""
    every_second = ModelCheckpoint(tmp_path / "checkpoints", filename="last", every_n_train_steps=2)
    module, batches = dino(), data(count=6)
    ours = fit(
        module,
        broken(batches, 3),
        callback(tmp_path, "rollback"),
        every_second,
        folder=tmp_path,
        enable_checkpointing=True,
    )
    at_checkpoint = reference_states(dino(), batches, skipped=set())[1]
    assert_equal(ours.states[3], at_checkpoint)
    # The same steps, without those since the checkpoint and without the bad one.
    expected = reference_states(dino(), batches, skipped={2, 3})
    assert_equal(ours.states[4], expected[4])
    assert_equal(ours.states[5], expected[5])
    assert "weights and optimizer were restored from" in capsys.readouterr().err


def test_a_rollback_without_a_checkpoint_skips_the_step(tmp_path: Path) -> None:
    ours = fit(dino(), broken(data(), 1), callback(tmp_path, "rollback"), folder=tmp_path)
    expected = reference_states(dino(), data(), skipped={1})
    assert_equal(ours.states[-1], expected[-1])


def test_a_full_queue_is_checked_again(tmp_path: Path) -> None:
    """Its rows that are empty again must not join an assignment."""
    torch.manual_seed(4)
    module = tiny_methods.build("swav", queue_length=16)
    full: list[bool] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            full.append(pl_module.queues[0].is_full)

    first = ModelCheckpoint(tmp_path / "checkpoints", filename="last", every_n_train_steps=1, save_top_k=1)
    first.on_train_batch_end = _once(first.on_train_batch_end)  # type: ignore[method-assign]
    ours = fit(
        module,
        broken(data(), 3),
        callback(tmp_path, "rollback"),
        first,
        Look(),
        folder=tmp_path,
        enable_checkpointing=True,
    )
    assert [int(state["queues.0.filled"]) for state in ours.states] == [8, 16, 16, 8, 16]
    assert full == [False, True, True, False, True]


def _once(function: Any) -> Any:
    calls: list[Any] = []

    def call(*args: Any) -> None:
        if not calls:
            calls.append(function(*args))

    return call


def test_another_fit_has_its_own_policy(tmp_path: Path) -> None:
    module = dino()
    fit(module, data(), callback(tmp_path, "skip"), folder=tmp_path / "a")
    with pytest.raises(FloatingPointError, match=f"at step {BAD}"):
        fit(module, broken(data(), BAD), folder=tmp_path / "b")
