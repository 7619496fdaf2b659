"""The logged norms equal the norms of the tensors."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from dino_lightning.training.callbacks.norms import Norms


def norm(tensors: Any) -> float:
    return float(sum(float((tensor.double() ** 2).sum()) for tensor in tensors) ** 0.5)


class Oracle(Callback):
    """Computes the norms independently, in a loop over tensors in other hooks."""

    def __init__(self) -> None:
        self.gradients: list[float] = []
        self.students: list[float] = []
        self.teachers: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(norm(w.grad for w in pl_module.student.parameters() if w.grad is not None))
        self.students.append(norm(pl_module.student.parameters()))
        self.teachers.append(norm(pl_module.teacher.parameters()))


def train(
    folder: Path, *callbacks: Callback, count: int = 8, parts: int = 1, ckpt_path: str | None = None, **trainer: Any
) -> list[dict[str, str]]:
    torch.manual_seed(0)
    module = tiny.dino(batch_size=8 // parts)
    batches: list[list[Tensor]] = tiny.split(tiny.batches(count, dtype=torch.float32), parts=parts)
    options: dict[str, Any] = {"max_epochs": 1, "log_every_n_steps": 2, "accumulate_grad_batches": parts, **trainer}
    options |= {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
    fitting = L.Trainer(**options, logger=CSVLogger(folder, name="", version=""), callbacks=list(callbacks))
    fitting.fit(module, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)  # type: ignore[arg-type]
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["norm/student"]]


@pytest.mark.parametrize(("parts", "precision"), [(1, "32-true"), (2, "32-true"), (1, "bf16-mixed")])
def test_rows_have_the_norms_of_the_tensors(tmp_path: Path, parts: int, precision: str) -> None:
    oracle = Oracle()
    rows = train(tmp_path, Norms(), oracle, parts=parts, precision=precision, enable_checkpointing=False)
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 7]
    for row in rows:
        step = int(row["step"])
        assert float(row["norm/gradient"]) == pytest.approx(oracle.gradients[step - 1], rel=1e-5)
        assert float(row["norm/student"]) == pytest.approx(oracle.students[step], rel=1e-5)
        assert float(row["norm/teacher"]) == pytest.approx(oracle.teachers[step], rel=1e-5)
    assert len({row["norm/gradient"] for row in rows}) == len({row["norm/teacher"] for row in rows}) == 4


def test_the_first_row_has_no_gradient(tmp_path: Path) -> None:
    rows = train(tmp_path, Norms(), count=2, log_every_n_steps=1, enable_checkpointing=False)
    assert [bool(row["norm/gradient"]) for row in rows] == [False, True]


class Ends(Callback):
    """Ends the run after its first epoch, while the schedules span two."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = True


def test_a_resumed_run_has_the_same_rows(tmp_path: Path) -> None:
    """Also if the run was interrupted after a norm was computed, but before it was logged."""
    whole = train(tmp_path / "whole", Norms(), max_epochs=2, enable_checkpointing=False, count=3)
    saving = ModelCheckpoint(tmp_path, filename="end", every_n_epochs=1)
    train(tmp_path / "first", Norms(), saving, Ends(), max_epochs=2, count=3)
    path = str(tmp_path / "end.ckpt")
    assert torch.load(path, weights_only=True)["callbacks"]["Norms"]["gradient"] is not None
    rest = train(tmp_path / "rest", Norms(), max_epochs=2, enable_checkpointing=False, count=3, ckpt_path=path)
    assert [row["norm/gradient"] for row in rest] == [row["norm/gradient"] for row in whole[1:]]


class Breaks(Callback):
    """Makes a gradient infinite before its norm is computed."""

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == 2:
            next(pl_module.student.parameters()).grad.fill_(float("inf"))


def test_a_nonfinite_norm_is_left_out(tmp_path: Path) -> None:
    from nonfinite_cases import callback

    rows = train(tmp_path, Breaks(), Norms(), callback(tmp_path, "skip"), enable_checkpointing=False)
    assert [bool(row["norm/gradient"]) for row in rows] == [True, False, True, True]
