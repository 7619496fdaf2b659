"""`metrics.csv` on a disk without room: no half of a row, and no row that is lost."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dino_lightning.callbacks.metrics_file import METRICS, MetricsFile, read_rows


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """The system itself writes what still fits into a file of `size` bytes, and refuses the rest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def log(logger: MetricsFile, step: int, **values: float) -> None:
    logger.log_metrics(values, step=step)
    logger.save()


def steps(folder: Path) -> list[int]:
    return [int(row["step"]) for row in read_rows(folder / METRICS)]


def test_rows_for_which_there_is_no_room_come_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = MetricsFile(tmp_path)
    log(logger, 0, loss=1.0)
    before = (tmp_path / METRICS).read_bytes()
    with files_end_at(len(before) + 3):  # a part of the row fits
        log(logger, 1, loss=2.0)
        log(logger, 2, loss=3.0)
        assert (tmp_path / METRICS).read_bytes() == before
    assert capsys.readouterr().err.count("metrics.csv could not be written") == 1
    log(logger, 3, loss=4.0)
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path / METRICS)] == [
        ("0", "1.0"), ("1", "2.0"), ("2", "3.0"), ("3", "4.0")
    ]  # fmt: skip
    with files_end_at(10):
        log(logger, 4, loss=5.0)
    assert "could not be written" in capsys.readouterr().err  # of another time, it is said again


def test_a_new_column_for_which_there_is_no_room(tmp_path: Path) -> None:
    logger = MetricsFile(tmp_path)
    log(logger, 0, loss=1.0)
    before = (tmp_path / METRICS).read_bytes()
    with files_end_at(len(before) + 3):
        log(logger, 1, loss=2.0, knn=50.0)
        assert (tmp_path / METRICS).read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == [METRICS]
    log(logger, 2, loss=3.0)
    assert steps(tmp_path) == [0, 1, 2]
    assert read_rows(tmp_path / METRICS)[1] == {"step": "1", "loss": "2.0", "knn": "50.0"}
