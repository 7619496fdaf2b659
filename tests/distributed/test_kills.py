"""A run that is killed at any moment and resumed is bit-identical to an uninterrupted one.

The tests compare the exported weights; the last checkpoint, with weights, optimizer, teacher, center, queues, states of
callbacks, loops and random generators of every rank; each row of `metrics.csv`, with losses, schedules and k-NN; the
summary; and, for every micro-batch of every process, its crops and the random states before it.
"""

import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from kills_run import drawn_kills, killed_and_resumed, start, unlike, words_of, write_shards

SEED = os.environ.get("KILLS_SEED", "0")
"""Seed of the random moments and signals."""


@dataclass
class Reference:
    """An undisturbed run with two loader processes and two micro-batches per step."""

    words: list[str]
    folder: Path
    status: Future[int]
    """Its only start, in parallel with the killed runs."""

    def check(self, folder: Path) -> None:
        """Assert that the run in `folder` has the same result."""
        assert self.status.result() == 0
        assert unlike(folder, self.folder) == []


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    words = words_of("trainer.accumulate_grad_batches=2", workers=2)
    folder = tmp_path_factory.mktemp("kills") / "reference"
    with ThreadPoolExecutor(1) as executor:
        yield Reference(words, folder, executor.submit(start, folder, words, copied=True))


@pytest.mark.slow
def test_a_run_killed_between_micro_batches_and_in_knn(reference: Reference, tmp_path: Path) -> None:
    """Between accumulated micro-batches, and by a signal during a k-NN evaluation."""
    killed_and_resumed(tmp_path / "run", reference.words, ["backward@2=SIGKILL", "knn@1=SIGTERM"], copied=True)
    reference.check(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills",
    [
        ["write@1=SIGKILL", "forward@11=raise"],
        ["rename@2=SIGKILL", "row@1=SIGKILL", "loader@1=parent"],
        ["forward@0=SIGTERM", "loader@2=SIGKILL", "step@9=SIGINT"],
        ["knn@2=SIGKILL", "batch@9=SIGUSR1", "export@0=SIGKILL"],
    ],
    ids=" ".join,
)
def test_a_run_killed_while_it_writes_files(kills: list[str], reference: Reference, tmp_path: Path) -> None:
    killed_and_resumed(tmp_path / "run", reference.words, kills)
    reference.check(tmp_path / "run")


@pytest.mark.slow
def test_signals_before_and_after_training(reference: Reference, tmp_path: Path) -> None:
    """Before training, the status requests a restart; after it, nothing is left to do."""
    killed_and_resumed(tmp_path / "run", reference.words, ["import@0=SIGTERM", "import@0=SIGUSR1", "export@0=SIGTERM"])
    reference.check(tmp_path / "run")
    assert start(tmp_path / "run", reference.words, kill="exit@0=SIGTERM") == 0


@pytest.mark.slow
def test_a_checkpoint_on_a_full_disk(reference: Reference, tmp_path: Path) -> None:
    """The previous checkpoint is kept, and the run continues with the same result."""
    assert start(tmp_path / "run", reference.words, kill="write@1=full") == 0
    assert "could not be written (No space left on device)" in (tmp_path / "run-notes" / "log.txt").read_text()
    reference.check(tmp_path / "run")


CASES: dict[str, tuple[list[str], int, int]] = {
    "no loaders": ([], 1, 0),
    "two ranks": ([], 2, 0),
    "two ranks, loaders, accumulated": (["trainer.accumulate_grad_batches=2"], 2, 2),
    "bf16": (["trainer.precision=bf16-mixed"], 1, 1),
    "batch norms": (["backbone=vovnet_micro", "method.head_batch_norm=true"], 1, 1),
    "swav": (["method=swav", "method.queue_length=32", "method.queue_start=2it"], 1, 0),
    "moco": (["method=moco", "crops.local_count=0", "method.queue_length=64"], 1, 0),
    "moco, two ranks": (["method=moco", "crops.local_count=0", "method.queue_length=64"], 2, 0),
    "masked patches": (["method.patch_loss_weight=1"], 1, 1),
    "crops on the device": (["crops=device"], 1, 1),
    "fsdp": (["trainer.strategy=fsdp"], 2, 0),
    "asynchronous checkpoints": (["callbacks.checkpoint.asynchronous=true"], 1, 1),
}
"""Overrides, ranks and loader processes by name."""
RANDOM = [(case, part) for case in CASES for part in range(2 if case in ("no loaders", "two ranks") else 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "part"), RANDOM)
def test_a_run_killed_at_random(case: str, part: int, tmp_path: Path) -> None:
    own, ranks, workers = CASES[case]
    words = words_of(*own, ranks=ranks, workers=workers)
    accumulate = 2 if "accumulated" in case else 1
    assert start(tmp_path / "reference", words) == 0
    kills = drawn_kills(f"{case} {part} {SEED}", accumulate=accumulate, ranks=ranks)
    killed_and_resumed(tmp_path / "run", words, kills)
    assert unlike(tmp_path / "run", tmp_path / "reference") == [], kills


@pytest.mark.slow
def test_a_stream_killed_at_random(tmp_path: Path) -> None:
    """Two loader processes read shards alternately, with a shuffle buffer."""
    shards = write_shards(tmp_path / "shards", count=4, images=24)
    words = words_of(
        "data=webdataset",
        "experiment=quick",
        f"data.shards='{shards}'",
        "data.images=64",
        "data.shuffle_buffer=16",
        "callbacks.knn.enabled=false",
        workers=2,
    )
    words = [word for word in words if not word.startswith(("data.train_images", "data.val_images", "callbacks.knn.b"))]
    assert start(tmp_path / "reference", words) == 0
    kills = drawn_kills(f"stream {SEED}")
    killed_and_resumed(tmp_path / "run", words, kills)
    assert unlike(tmp_path / "run", tmp_path / "reference") == [], kills


@pytest.mark.slow
def test_wandb_shows_one_run(tmp_path: Path) -> None:
    words = words_of("logger=wandb")
    killed_and_resumed(tmp_path / "run", words, ["batch@5=SIGKILL", "forward@10=SIGTERM"])
    folders = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(folders) == 3
    assert len({re.sub(r"offline-run-\d+_\d+-", "", name) for name in folders}) == 1


@pytest.mark.slow
def test_only_ends_of_epochs_are_saved(tmp_path: Path) -> None:
    """Without time-based checkpoints, a killed run repeats the epoch."""
    words = [*words_of(workers=1), "callbacks.checkpoint.every_n_minutes=0"]
    assert start(tmp_path / "reference", words) == 0
    killed_and_resumed(tmp_path / "run", words, ["forward@5=SIGKILL", "backward@12=SIGKILL"])
    assert unlike(tmp_path / "run", tmp_path / "reference") == []
