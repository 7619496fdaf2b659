"""The text of the progress bar, and the rows in which the speed is logged."""

import csv
import io
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch.utils.data import DataLoader

from dino_lightning.config import KNNConfig
from dino_lightning.training.callbacks.knn import KNNCallback
from dino_lightning.training.callbacks.progress import RunProgress
from dino_lightning.training.callbacks.throughput import Throughput


class Slow(Callback):
    """Each micro-batch takes at least this many seconds."""

    def on_train_batch_start(self, *_: Any) -> None:
        time.sleep(0.02)


def fit(*callbacks: Callback, folder: Path, micro_batches: tiny.Batches, **options: Any) -> tiny.Record:
    record = tiny.Record()
    small: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False}
    small |= {"enable_model_summary": False, "logger": CSVLogger(folder, name="", version="")}
    trainer = L.Trainer(**small, **options, callbacks=[record, *callbacks])
    module = tiny.dino(batch_size=len(micro_batches[0][0]))
    trainer.fit(module, DataLoader(micro_batches, batch_size=None))  # type: ignore[arg-type]
    return record


@pytest.mark.parametrize("accumulated", [1, 2])
def test_speed_is_logged_with_the_last_step_it_covers(tmp_path: Path, accumulated: int) -> None:
    speed = Throughput()
    micro = tiny.split(tiny.batches(6, dtype=torch.float32), parts=accumulated)
    options: dict[str, Any] = {"accumulate_grad_batches": accumulated, "log_every_n_steps": 2, "max_epochs": 2}
    fit(Slow(), speed, folder=tmp_path, micro_batches=micro, enable_progress_bar=False, **options)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["speed/images_per_second"]]
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 7, 9, 11]
    assert all(row["train/loss"] for row in rows)
    assert speed.images == 2 * 6 * 8
    # Every row covers 16 images: miscounted ones would make it slower or faster than the others.
    seconds = [16 / float(row["speed/images_per_second"]) for row in rows]
    assert min(seconds) >= 2 * accumulated * 0.02
    assert sum(seconds) == pytest.approx(speed.seconds, rel=1e-6)


def test_the_line_of_an_epoch_has_its_last_loss(tmp_path: Path) -> None:
    speed, knn = Throughput(), KNNCallback(KNNConfig(enabled=False))
    knn.last = {"top1": 12.345}
    bar = RunProgress(speed)
    bar.console = Console(file=io.StringIO(), width=200)
    batches = tiny.batches(3, dtype=torch.float32)
    record = fit(speed, knn, bar, folder=tmp_path, micro_batches=batches, max_epochs=2)
    lines = bar.console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 2
    for epoch, line in enumerate(lines):
        assert line.startswith(f"epoch {epoch + 1}/2  loss {record.losses[3 * epoch + 2]:.3f}  k-NN 12.3 %  ")
        assert line.endswith(" images/s")
