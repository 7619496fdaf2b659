"""A full disk: `metrics.csv` has no partial row and loses none, and the run continues to its end."""

import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from composing import SMALL, composed

from dino_lightning.data.bad_images import BadImages
from dino_lightning.errors import UserError
from dino_lightning.loggers.csv import METRICS_FILE, MetricsCSVLogger, read_rows
from dino_lightning.training.run import train


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """The system itself writes what still fits into a file of `size` bytes, and refuses the rest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def log(logger: MetricsCSVLogger, step: int, **values: float) -> None:
    logger.log_metrics(values, step=step)
    logger.save()


def steps(folder: Path) -> list[int]:
    return [int(row["step"]) for row in read_rows(folder / METRICS_FILE)]


def test_rows_are_written_once_there_is_space(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = MetricsCSVLogger(tmp_path)
    log(logger, 0, loss=1.0)
    before = (tmp_path / METRICS_FILE).read_bytes()
    with files_end_at(len(before) + 3):  # a part of the row fits
        log(logger, 1, loss=2.0)
        log(logger, 2, loss=3.0)
        assert (tmp_path / METRICS_FILE).read_bytes() == before
    assert capsys.readouterr().err.count("metrics.csv could not be written") == 1
    log(logger, 3, loss=4.0)
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path / METRICS_FILE)] == [
        ("0", "1.0"),
        ("1", "2.0"),
        ("2", "3.0"),
        ("3", "4.0"),
    ]
    with files_end_at(10):
        log(logger, 4, loss=5.0)
    assert "could not be written" in capsys.readouterr().err  # a later failure is reported again


def test_a_new_column_on_a_full_disk(tmp_path: Path) -> None:
    logger = MetricsCSVLogger(tmp_path)
    log(logger, 0, loss=1.0)
    before = (tmp_path / METRICS_FILE).read_bytes()
    with files_end_at(len(before) + 3):
        log(logger, 1, loss=2.0, knn=50.0)
        assert (tmp_path / METRICS_FILE).read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]
    log(logger, 2, loss=3.0)
    assert steps(tmp_path) == [0, 1, 2]
    assert read_rows(tmp_path / METRICS_FILE)[1] == {"step": "1", "loss": "2.0", "knn": "50.0"}


def test_bad_images_are_counted_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad_images.txt"
    images = BadImages(file, images=4, on_error="skip", max_bad_share=0.3)
    with files_end_at(0):
        images.note("a.jpg", "truncated")
        assert "a.jpg (truncated)" in capsys.readouterr().err
        with pytest.raises(UserError, match="2 of 4 images cannot be read"):
            images.note("b.jpg", "truncated")


@pytest.mark.slow
def test_a_run_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It trains to its end, and resuming it with free space writes its results."""
    words = [*SMALL, "callbacks.pictures.every_n_epochs=1", "callbacks.checkpoint.every_n_minutes=0"]
    words += ["data.train_images=32", "data.val_images=16"]
    fit = L.Trainer.fit
    with ExitStack() as full:

        def from_here_on(*arguments: Any, **options: Any) -> None:
            full.enter_context(files_end_at(64))
            fit(*arguments, **options)

        monkeypatch.setattr(L.Trainer, "fit", from_here_on)
        with pytest.raises(UserError, match="the run has finished, but its results could not be written"):
            train(composed(*words, output_dir=tmp_path / "full"))
    printed = capsys.readouterr().err
    assert "last.ckpt could not be written" in printed
    assert "crops.png could not be written" in printed
    assert "attention_epoch0001.png could not be written" in printed
    assert "epoch 2/2" in printed
    monkeypatch.undo()
    train(composed(*words, "resume=auto", output_dir=tmp_path / "full"))
    assert (tmp_path / "full" / "teacher.safetensors").exists()
