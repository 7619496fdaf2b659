"""The logged speed equals independent measurements."""

import csv
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from dino_lightning.data.loader import ResumableLoader
from dino_lightning.training.callbacks.throughput import Throughput, peak_flops

PAUSE_S = 0.05


class Slow(ResumableLoader):
    """Eight batches, each with a pause."""

    def __init__(self, *, pause_s: float) -> None:
        super().__init__(DataLoader(tiny.batches(8, dtype=torch.float32), batch_size=None), images_per_batch=8)  # type: ignore[arg-type]
        self.pause_s = pause_s

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[Any]:
        return self._timed(self._batches())

    def _batches(self) -> Iterator[Any]:
        for batch in self.loader:
            time.sleep(self.pause_s)
            yield batch


def rows_of(folder: Path, loader: Any, speed: Throughput) -> list[dict[str, float]]:
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "log_every_n_steps": 4}
    options |= {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(**options, logger=CSVLogger(folder, name="", version=""), callbacks=[speed]).fit(tiny.dino(), loader)
    with (folder / "metrics.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if "speed/images_per_second" in row]


def test_the_share_of_time_waiting_for_data(tmp_path: Path) -> None:
    """The share includes the pauses of this loader, and not those of another."""
    begin = time.perf_counter()
    rows = rows_of(tmp_path / "slow", Slow(pause_s=PAUSE_S), Throughput())
    elapsed = time.perf_counter() - begin
    assert len(rows) == 2
    seconds = [4 * 8 / row["speed/images_per_second"] for row in rows]
    assert sum(seconds) < elapsed
    for row, window in zip(rows, seconds, strict=True):
        assert 4 * PAUSE_S <= row["speed/data_wait_share"] * window <= window
    (first, second) = rows_of(tmp_path / "fast", Slow(pause_s=0.0), Throughput())
    waited = sum(32 / row["speed/images_per_second"] * row["speed/data_wait_share"] for row in (first, second))
    assert waited < 8 * PAUSE_S


def test_a_loader_without_a_clock_has_no_share(tmp_path: Path) -> None:
    loader = DataLoader(tiny.batches(4, dtype=torch.float32), batch_size=None)  # type: ignore[arg-type]
    (row,) = rows_of(tmp_path, loader, Throughput())
    assert "speed/data_wait_share" not in row
    assert "speed/gpu_memory_gib" not in row


def test_mfu_is_flops_over_the_peak(tmp_path: Path) -> None:
    speed = Throughput(flops_per_image=lambda method: 3e9, peak=lambda device, precision: 4e12)
    for row in rows_of(tmp_path, Slow(pause_s=0.0), speed):
        assert row["speed/mfu"] == pytest.approx(row["speed/images_per_second"] * 3e9 / 4e12)


def test_unknown_flops_are_reported_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(method: Any) -> float:
        raise NotImplementedError("no kernel")

    rows = rows_of(tmp_path, Slow(pause_s=0.0), Throughput(flops_per_image=refuse, peak=lambda device, precision: 4e12))
    assert all("speed/mfu" not in row for row in rows)
    assert "speed/mfu is not logged: the FLOPs of this network could not be counted (no kernel)." in (
        capsys.readouterr().err
    )


def test_the_peak_of_a_cpu_is_unknown() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert peak_flops(torch.device("cpu"), "bf16-mixed") is None
