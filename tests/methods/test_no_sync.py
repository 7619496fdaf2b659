"""Nothing in a step waits for the device: no number is asked of it, and none is copied to it from pageable memory."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import nonfinite_cases
import pytest
import tiny
import torch
from device_waits import EnterBetweenBatches, waits
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from slow_params import first
from torch.utils.data import DataLoader

from dino_lightning.config import AdamWConfig, CollapseConfig, LARSConfig, OptimConfig, SGDConfig
from dino_lightning.losses import centering
from dino_lightning.training.callbacks import progress
from dino_lightning.training.callbacks.collapse_alarm import CollapseAlarm
from dino_lightning.training.callbacks.norms import Norms
from dino_lightning.training.callbacks.progress import RunProgress
from dino_lightning.training.callbacks.throughput import Throughput

OPTIMS = {"adamw": AdamWConfig(clip_grad=0.05), "sgd": SGDConfig(), "lars": LARSConfig()}


def train(module: Any, loader: Any, watch: Callback, *, folder: Path, **trainer: Any) -> L.Trainer:
    """One epoch with all that a run has for every step: a logger, alarms, speed, and the bar, drawn each time."""
    speed, alarm = Throughput(), CollapseAlarm(CollapseConfig(after="0it", patience=1))
    keeper = nonfinite_cases.callback(folder, "stop")
    bar = RunProgress(speed)
    bar.console = Console(file=io.StringIO(), force_terminal=True)
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "log_every_n_steps": 2, **trainer}
    options |= {"enable_checkpointing": False, "enable_model_summary": False}
    fitting = L.Trainer(
        **options, logger=CSVLogger(folder, name="", version=""), callbacks=[watch, speed, Norms(), alarm, keeper, bar]
    )
    fitting.fit(module, loader)
    assert "loss" in bar.console.file.getvalue()  # type: ignore[attr-defined]
    assert "norm/gradient" in (folder / "metrics.csv").read_text()
    assert "collapse/teacher_entropy" in (folder / "metrics.csv").read_text()
    assert alarm._rows
    return fitting


@pytest.fixture(autouse=True)
def _drawn_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REFRESH_INTERVAL_S", 0.0)


def list_loader(count: int, *, parts: int = 1, **options: Any) -> DataLoader:
    data = tiny.split(tiny.batches(count, dtype=torch.float32), parts=parts)
    return DataLoader(data, batch_size=None, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulated", first([1, 2]))
@pytest.mark.parametrize("name", OPTIMS)
@pytest.mark.slow_after_first(3)
def test_no_step_waits_for_the_device(tmp_path: Path, name: str, accumulated: int, precision: str) -> None:
    """Over four optimizer steps, every second of which is logged."""
    optim: OptimConfig = OPTIMS[name]
    module = tiny.dino(optim=optim, batch_size=8 // accumulated)
    watch = EnterBetweenBatches(waits(), first=2 * accumulated, last=6 * accumulated)
    options = {"precision": precision, "accumulate_grad_batches": accumulated}
    train(module, list_loader(8, parts=accumulated), watch, folder=tmp_path, **options)
    assert watch.result == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.item(),
        lambda x: float(x),
        lambda x: bool(x > 0),
        lambda x: torch.isfinite(x) and 1,
        lambda x: x.reshape(1)[x.reshape(1) > 0],
        lambda x: torch.tensor(1.0, device=x.device),
        lambda x: x.new_tensor([3]),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
    ],
)
def test_operations_that_wait_are_detected(ask: Any) -> None:
    with waits() as seen:
        ask(torch.rand(()))
    assert seen


def test_other_operations_are_not_detected() -> None:
    with waits() as seen:
        x = torch.rand(3)
        (x.new_full((1,), 2.0) + x.sum()).clamp(min=0)
        torch.where(x > 0, x, torch.full((), 0.5)).masked_fill(x > 1, 0).to(torch.float64)
    assert seen == []


@contextmanager
def errors_of_cuda() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", OPTIMS)
def test_no_step_waits_for_a_gpu(tmp_path: Path, name: str, precision: str) -> None:
    """PyTorch raises an error wherever it would wait, in 17 of 20 steps and all that lies between them."""
    watch = EnterBetweenBatches(errors_of_cuda(), first=2, last=19)
    module = tiny.dino(optim=OPTIMS[name])
    loader = list_loader(20, pin_memory=True)
    trainer = train(module, loader, watch, folder=tmp_path, accelerator="gpu", precision=precision)
    assert trainer.global_step == 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_no_fp16_step_waits_for_a_gpu(tmp_path: Path, name: str) -> None:
    """Overflows and the loss scale are counted and logged on the device. LARS is left out: the scaler asks for it."""
    watch = EnterBetweenBatches(errors_of_cuda(), first=2, last=19)
    module = tiny.dino(optim=OPTIMS[name])
    loader = list_loader(20, pin_memory=True)
    train(module, loader, watch, folder=tmp_path, accelerator="gpu", precision="16-mixed")
    assert "amp/overflows" in (tmp_path / "metrics.csv").read_text()


def test_the_center_is_reduced_during_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves before the student starts, and is waited for when all else is done."""
    events: list[str] = []
    start = centering.all_reduce_sum_later

    def started(tensor: torch.Tensor) -> Any:
        wait = start(tensor)
        events.append("start")
        return lambda: events.append("wait") or wait()

    monkeypatch.setattr(centering, "all_reduce_sum_later", started)
    module = tiny.dino(batch_size=4)
    module.student.backbone.register_forward_pre_hook(lambda *_: events.append("student"))
    monkeypatch.setattr(module, "on_after_backward", lambda: events.append("backward"))
    tiny.fit(module, tiny.split(tiny.batches(1), parts=2), accumulate_grad_batches=2)
    assert events == ["start", "student", "backward"] * 2 + ["wait"] * 2
