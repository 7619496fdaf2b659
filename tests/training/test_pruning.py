"""Pruning of runs in a sweep: the rule, the compared runs, and a real run."""

import json
import random
import sys
from pathlib import Path
from statistics import median
from unittest.mock import patch

import pytest
import torch
from composing import SMALL, composed
from ranks import on_ranks
from slow_params import first
from sweep_cases import make_run

from dino_lightning.config import PruningConfig
from dino_lightning.errors import UserError
from dino_lightning.training.callbacks.pruning import Pruning, finished_siblings, is_worse
from dino_lightning.training.run import train

pytest.importorskip("optuna", reason='pip install "dino-lightning[optuna]"')

SHORT = [*SMALL, "callbacks.pictures.enabled=false", "trainer.enable_progress_bar=false", "trainer.max_epochs=3"]
SHORT += ["data.train_images=32", "data.val_images=16"]
PRUNED = ["callbacks.pruning.enabled=true", "callbacks.pruning.after_jobs=2"]


def below_the_median(values: dict[int, float], others: list[dict[int, float]], *, after_jobs: int) -> bool:
    """Compare the best accuracy so far with the median of the others at the latest epoch."""
    epoch = max(values)
    there = [other[epoch] for other in others if epoch in other]
    return len(there) >= after_jobs and max(values.values()) < median(there)


def test_the_median_rule() -> None:
    draw, seen = random.Random(0), []
    for _ in range(40):
        others = [{e: draw.uniform(0, 100) for e in range(draw.randint(1, 4))} for _ in range(draw.randint(0, 6))]
        values = {epoch: draw.uniform(0, 70) for epoch in range(draw.randint(1, 3))}
        expected = below_the_median(values, others, after_jobs=2)
        assert is_worse(values, others, PruningConfig(after_jobs=2)) == expected, (values, others)
        seen.append(expected)
    assert 5 < sum(seen) < 35


@pytest.mark.parametrize(("keep", "worst_kept"), [(20, 50.0), (80, 20.0)])
def test_other_values_of_keep_percent(keep: float, worst_kept: float) -> None:
    """Among 10, 20, ..., 60, the upper fifth begins at 50, the upper four fifths at 20."""
    others = [{0: 10.0 * number} for number in range(1, 7)]
    config = PruningConfig(after_jobs=1, keep_percent=keep)
    assert not is_worse({0: worst_kept}, others, config)
    assert is_worse({0: worst_kept - 0.1}, others, config)


def test_only_finished_runs_of_the_sweep_are_compared(tmp_path: Path) -> None:
    for name, state in enumerate(["finished", "pruned", "under way", "failed", "finished"]):
        make_run(tmp_path / str(name), {}, [10.0 + name, 20.0 + name], state=state)
    make_run(tmp_path / "of_another_kind", {}, [1.0])
    (tmp_path / "5").mkdir()
    (tmp_path / "multirun.yaml").write_text("")
    assert finished_siblings(tmp_path / "4") == [{0: 10.0, 1: 20.0}]
    assert finished_siblings(tmp_path / "2") == [{0: 10.0, 1: 20.0}, {0: 14.0, 1: 24.0}]


@pytest.mark.parametrize(
    ("others", "warmup", "epochs"), first([(100.0, "1ep", 2), (100.0, "2ep", 3), (0.0, "0ep", 3)], fast=2)
)
@pytest.mark.slow_after_first(1)
def test_a_pruned_run_ends_with_its_results(
    others: float, warmup: str, epochs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run is pruned after its first epoch past the warm-up, but never at its last one."""
    for name in "01":
        make_run(tmp_path / name, {}, [others] * 3)
    torch.manual_seed(0)
    figure = train(composed(*SHORT, *PRUNED, f"callbacks.pruning.warmup={warmup}", output_dir=tmp_path / "2"))
    summary = json.loads((tmp_path / "2" / "summary.json").read_text())
    assert (summary["epochs"], summary["knn_top1"]) == (epochs, figure)
    assert (tmp_path / "2" / "teacher.safetensors").exists()
    printed = capsys.readouterr().err
    if epochs == 3:
        assert summary["pruned"] is None
        assert "Pruned" not in printed
    else:
        assert summary["pruned"].startswith("after epoch 2 of 3: its best k-NN accuracy, ")
        assert f"Pruned {summary['pruned']}. The run ends here" in printed


@pytest.mark.parametrize(
    ("words", "folder", "message"),
    [
        (["callbacks.knn.enabled=false"], "3", "callbacks.knn.enabled=false"),
        ([], "alone", "add --multirun"),
        (["callbacks.pruning.after_jobs=0"], "3", "callbacks.pruning.after_jobs=0: expected at least 1"),
        (["callbacks.pruning.keep_percent=100"], "3", "callbacks.pruning.keep_percent=100"),
        (["callbacks.pruning.warmup=9ep"], "3", "callbacks.pruning.warmup=9ep is longer"),
    ],
)
def test_invalid_settings_are_refused(words: list[str], folder: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        train(composed(*SHORT, "callbacks.pruning.enabled=true", *words, output_dir=tmp_path / folder))
    assert not list(tmp_path.rglob("config.yaml"))


def test_without_optuna_the_extra_is_named(tmp_path: Path) -> None:
    with (
        patch.dict(sys.modules, {"optuna": None}),
        pytest.raises(UserError, match=r'pip install "dino-lightning\[optuna\]"'),
    ):
        train(composed(*SHORT, "callbacks.pruning.enabled=true", output_dir=tmp_path / "0"))


class Knn:
    """A k-NN callback with a result at step 10."""

    def __init__(self) -> None:
        self.last_step, self.last = 10, {"top1": 50.0}


class Trainer:
    """A trainer after the second of three epochs."""

    global_step, current_epoch, max_epochs, should_stop = 10, 1, 3, False

    def __init__(self, rank: int, *, max_steps: int = -1) -> None:
        self.is_global_zero, self.max_steps = rank == 0, max_steps


class Module:
    """A method without warm-up."""

    def duration(self, text: str, *, key: str) -> int:
        return 0


@pytest.mark.parametrize("max_steps", [10, 11])
def test_a_run_is_not_pruned_at_its_last_step(max_steps: int, tmp_path: Path) -> None:
    for name in "01":
        make_run(tmp_path / name, {}, [60.0] * 3)
    pruning = Pruning(PruningConfig(after_jobs=2), folder=tmp_path / "2", knn=Knn())  # type: ignore[arg-type]
    pruning.on_train_epoch_end(Trainer(0, max_steps=max_steps), Module())  # type: ignore[arg-type]
    assert (pruning.verdict is None) == (max_steps == 10)


def ends_on_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    trainer = Trainer(rank)
    # The other rank may not have access to the files of rank 0.
    own = Path(folder) / "2" if rank == 0 else Path(folder) / "nowhere" / "2"
    pruning = Pruning(PruningConfig(after_jobs=2), folder=own, knn=Knn())  # type: ignore[arg-type]
    pruning.on_train_epoch_end(trainer, Module())  # type: ignore[arg-type]
    torch.save(trainer.should_stop, Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("others", [60.0, 40.0])
def test_all_ranks_end_together(others: float, tmp_path: Path) -> None:
    for name in "01":
        make_run(tmp_path / name, {}, [others] * 3)
    on_ranks(ends_on_rank, str(tmp_path))
    assert [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)] == [others == 60.0] * 2
