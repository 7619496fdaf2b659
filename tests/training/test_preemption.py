"""A run that receives a signal saves, exits with the signal's status, and resumes without a difference."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import SMALL, composed
from slow_params import first

from dino_lightning.loggers.csv import read_rows
from dino_lightning.methods.base import Method
from dino_lightning.runtime.scheduler import INTERRUPTED, PREEMPTED
from dino_lightning.runtime.signals import exit_on_signal
from dino_lightning.training.callbacks import knn
from dino_lightning.training.run import train

QUIET = [
    "callbacks.knn.batch_size_per_device=16",
    "callbacks.pictures.enabled=false",
    "trainer.enable_progress_bar=false",
    "cpu_threads=1",
]
STOPS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED, signal.SIGUSR1: PREEMPTED}
# The k-NN accuracy does not matter to tests that do not compare with the uninterrupted run.
WITHOUT_KNN = "callbacks.knn.enabled=false"


def run(output: Path, *overrides: str) -> float | None:
    return train(composed(*SMALL, *QUIET, "backbone.drop_path_rate=0.2", *overrides, output_dir=output))


def rows(output: Path) -> list[dict[str, str]]:
    """Without the measured speed."""
    found = read_rows(output / "metrics.csv")
    return [{key: value for key, value in row.items() if not key.startswith("speed/")} for row in found]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    run(output)
    return output


def at_call(number: int, number_of_signal: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but its n-th call first sends a signal to this process."""
    calls = 0

    def call(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), number_of_signal)
        return real(*args, **options)

    return call


def expect_exit(output: Path, status: int, *overrides: str) -> None:
    with pytest.raises(SystemExit) as exited:
        run(output, *overrides)
    assert exited.value.code == status


def expect_same(output: Path, whole: Path) -> None:
    assert rows(output) == rows(whole)
    ours, theirs = weights(output), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("number", first(STOPS), ids=lambda number: number.name)
def test_a_signal_in_a_step(number: signal.Signals, tmp_path: Path, whole: Path, monkeypatch: Any) -> None:
    """Other tests send SIGTERM."""
    handlers = [signal.getsignal(each) for each in STOPS]
    with monkeypatch.context() as patch:
        patch.setattr(Method, "configure_gradient_clipping", at_call(9, number, Method.configure_gradient_clipping))
        expect_exit(tmp_path, STOPS[number])
    assert [signal.getsignal(each) for each in STOPS] == handlers
    # Received before the step after the signal's, and saved after that step.
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] in (9, 10)
    assert not (tmp_path / "summary.json").exists()
    run(tmp_path, "resume=auto")
    expect_same(tmp_path, whole)


def test_the_early_handler_does_not_replace_the_runs_handler(tmp_path: Path, monkeypatch: Any) -> None:
    """With the early handler of `dino train` installed, a signal during training still saves first."""
    signal.signal(signal.SIGTERM, exit_on_signal)
    monkeypatch.setattr(
        Method, "configure_gradient_clipping", at_call(2, signal.SIGTERM, Method.configure_gradient_clipping)
    )
    expect_exit(tmp_path, PREEMPTED, WITHOUT_KNN)
    assert signal.getsignal(signal.SIGTERM) is exit_on_signal
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] in (2, 3)


@pytest.mark.slow
def test_a_signal_in_an_evaluation(tmp_path: Path, whole: Path, monkeypatch: Any) -> None:
    """The evaluation is repeated later: its row and the best checkpoint equal an uninterrupted run's."""
    with monkeypatch.context() as patch:
        # Calls 1 and 2 are the untrained network's bank and queries, 3 and 4 those of the first epoch.
        patch.setattr(knn, "extract_features", at_call(3, signal.SIGTERM, knn.extract_features))
        expect_exit(tmp_path, PREEMPTED)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["KNNCallback"]["interrupted"]
    assert not (tmp_path / "checkpoints" / "best_knn.ckpt").exists()
    run(tmp_path, "resume=auto")
    expect_same(tmp_path, whole)
    best = [
        torch.load(each / "checkpoints" / "best_knn.ckpt", weights_only=True)["global_step"]
        for each in (tmp_path, whole)
    ]
    assert best[0] == best[1]


@pytest.mark.slow
def test_a_signal_at_the_end_of_the_run_is_ignored(tmp_path: Path, whole: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(knn, "extract_features", at_call(5, signal.SIGTERM, knn.extract_features))
    run(tmp_path)
    expect_same(tmp_path, whole)


def test_submitits_handler_is_called_after_saving(tmp_path: Path, monkeypatch: Any) -> None:
    called: list[tuple[int, bool]] = []

    def requeue(number: int, _: Any) -> None:
        called.append((number, (tmp_path / "checkpoints" / "last.ckpt").exists()))

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        monkeypatch.setattr(
            Method, "configure_gradient_clipping", at_call(2, signal.SIGUSR2, Method.configure_gradient_clipping)
        )
        expect_exit(tmp_path, PREEMPTED, WITHOUT_KNN)
        assert signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert called == [(signal.SIGUSR2, True)]


@pytest.mark.slow
def test_time_based_checkpoints(tmp_path: Path, monkeypatch: Any) -> None:
    """Also between the ends of epochs; `keep_last` limits their number."""
    run(tmp_path, "callbacks.checkpoint.every_n_minutes=0.0001", WITHOUT_KNN, "callbacks.checkpoint.keep_last=20")
    folder = tmp_path / "checkpoints"
    steps = {torch.load(path, weights_only=True)["global_step"] for path in folder.glob("last*.ckpt")}
    assert {6, 12} < steps  # the ends of epochs
    assert len(steps) >= 5


@pytest.mark.slow
def test_no_time_based_checkpoints(tmp_path: Path) -> None:
    run(tmp_path, "callbacks.checkpoint.every_n_minutes=0", WITHOUT_KNN, "callbacks.checkpoint.keep_last=20")
    names = {path.name for path in (tmp_path / "checkpoints").glob("last*.ckpt")}
    assert names == {"last.ckpt", "last-1.ckpt"}
