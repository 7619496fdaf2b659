"""`metrics.csv` of killed and resumed runs."""

from pathlib import Path

import pytest

from dino_lightning.loggers.csv import METRICS_FILE, MetricsCSVLogger, has_row, read_rows


def log(output: Path, *steps: int, before_step: int | None = None, **values: float) -> None:
    logger = MetricsCSVLogger(output, before_step=before_step)
    for step in steps:
        logger.log_metrics({"loss": step / 10, **values}, step=step)
        logger.save()


def steps(output: Path) -> list[int]:
    return [int(row["step"]) for row in read_rows(output / METRICS_FILE)]


def test_rows_and_columns(tmp_path: Path) -> None:
    logger = MetricsCSVLogger(tmp_path)
    logger.log_metrics({"b": 1.5}, step=0)
    logger.save()
    logger.log_metrics({"a": 2.5, "b": 3.5}, step=1)
    logger.log_metrics({"b": 4.5}, step=2)
    logger.save()
    assert (tmp_path / METRICS_FILE).read_text().split() == ["a,b,step", ",1.5,0", "2.5,3.5,1", ",4.5,2"]


def test_a_resumed_run_drops_rows_that_it_repeats(tmp_path: Path) -> None:
    log(tmp_path, 0, 1, 2, 3, 4)
    log(tmp_path, 3, 4, 5, before_step=3, late=1.0)
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5]
    assert has_row(tmp_path / METRICS_FILE, step=3, keys=["loss", "late"])
    assert not has_row(tmp_path / METRICS_FILE, step=2, keys=["late"])


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    log(tmp_path, 0, 1)
    log(tmp_path, 0)
    assert steps(tmp_path) == [0]


def test_the_rows_are_in_the_file_from_the_start(tmp_path: Path) -> None:
    """Lightning's logger deletes the file first, and a kill before the next row would leave nothing."""
    log(tmp_path, 0, 1, 2)
    assert MetricsCSVLogger(tmp_path, before_step=2).experiment is not None
    assert steps(tmp_path) == [0, 1]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_truncated_row_is_dropped(tmp_path: Path, cut: int) -> None:
    log(tmp_path, 0, 1, 2, second=0.25)
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes()[:-cut])
    log(tmp_path, 2, 3, before_step=2)
    assert steps(tmp_path) == [0, 1, 2, 3]
