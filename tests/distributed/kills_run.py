"""Runs of `train.py` that are killed and resumed, for `test_kills.py`."""

import io
import json
import os
import random
import subprocess
import sys
import tarfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soak_measures as measures
from PIL import Image
from programs import TRAIN, processes_of, start_program
from soak_compare import differences

ROOT = Path(__file__).parents[2]
PLUGIN = Path(__file__).with_name("kills_worker.py")
EPOCHS, PER_EPOCH = 2, 8
"""Epochs, and micro-batches of each rank in one."""
IMAGES, LIMIT = 64, 300.0
"""Training images; seconds for one start."""
SMALL = (
    "experiment=quick",
    f"data.train_images={IMAGES}",
    "data.val_images=24",
    "crops.local_count=1",
    "backbone.drop_path_rate=0.3",
    "trainer.accelerator=cpu",
    f"trainer.max_epochs={EPOCHS}",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "cpu_threads=1",
    "callbacks.pictures.enabled=false",
    "callbacks.knn.bank=32",
    "callbacks.knn.baselines=false",
    "callbacks.knn.batch_size_per_device=16",
    "callbacks.checkpoint.every_n_minutes=0.0001",  # after almost every step
    f"imports=[{PLUGIN}]",
    "resume=auto",
)
LEAVES = {"SIGKILL": -9, "parent": -9, "SIGTERM": 75, "SIGUSR1": 75, "SIGINT": 130, "raise": 1}
"""Exit status of the first process by signal."""


def words_of(*words: str, ranks: int = 1, workers: int = 0) -> list[str]:
    """The command line of a run: `SMALL` and further overrides."""
    batch = IMAGES // PER_EPOCH // ranks
    devices = [f"trainer.devices={ranks}", "trainer.strategy=ddp"] if ranks > 1 else ["trainer.devices=1"]
    return [*SMALL, f"data.num_workers={workers}", f"data.batch_size_per_device={batch}", *devices, *words]


def start(folder: Path, words: list[str], *, kill: str = "", copied: bool = False) -> int:
    """Start the run once; returns its exit status when none of its processes is left.

    `copied`: in a forked process that has loaded the libraries, instead of a new Python.
    """
    notes = folder.with_name(f"{folder.name}-notes")
    notes.mkdir(parents=True, exist_ok=True)
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    variables = {"KILL": kill, "NOTES": str(notes), "KILLS_RUN": mark, "WANDB_SILENT": "true"}
    variables |= {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    with (notes / "log.txt").open("a") as log:
        log.write(f"\n==== {kill}\n")
    begin = _start_copy if copied else _start_python
    status, left = begin([*words, f"output_dir={folder}"], notes / "log.txt", variables)
    until = time.monotonic() + 60
    while left():
        assert time.monotonic() < until, f"{kill}: processes are left over: {left()}"
        time.sleep(0.05)
    return status


def _start_python(words: list[str], log: Path, variables: dict[str, str]) -> tuple[int, Callable[[], list[int]]]:
    """The exit status, and a filter that finds remaining processes by their environment, whatever their parent."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, TRAIN, *words],
            env=os.environ | variables,
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        status = process.wait(LIMIT)
    return status, lambda: measures.processes_of(f"KILLS_RUN={variables['KILLS_RUN']}")


def _start_copy(words: list[str], log: Path, variables: dict[str, str]) -> tuple[int, Callable[[], list[int]]]:
    """The same by their session."""
    process = start_program(TRAIN, *words, cwd=ROOT, stdout=log, stderr=log, variables=variables)
    process.join(LIMIT)
    assert process.exitcode is not None, f"it still runs after {LIMIT:.0f} s"
    first = process.pid or 0
    return process.exitcode, lambda: processes_of(first)


def killed_and_resumed(folder: Path, words: list[str], kills: list[str], *, copied: bool = False) -> None:
    """A run that is killed by each of `kills` in turn, and finally finishes."""
    notes = folder.with_name(f"{folder.name}-notes")
    for kill in kills:
        status = start(folder, words, kill=kill, copied=copied)
        log = (notes / "log.txt").read_text()[-3000:]
        assert {"kill": kill} in read(notes / "kills.jsonl"), f"{kill} did not happen: {log}"
        assert status in expected(kill), f"{kill}: status {status}: {log}"
        assert not (folder / "summary.json").exists(), kill
    assert start(folder, words, copied=copied) == 0, (notes / "log.txt").read_text()[-3000:]


def expected(kill: str) -> set[int]:
    """Exit statuses of the first process that are correct after a kill."""
    how, _, rank = kill.split("=")[1].partition(" on ")
    if kill.startswith("loader") and how == "SIGKILL":
        return {1}
    if rank and how in ("SIGKILL", "raise"):  # it reports the lost rank, or is ended by it
        return set(range(-64, 256)) - {0}
    if rank and how == "SIGINT":  # rank 0 does not know the signal
        return {75}
    return {LEAVES[how]}


def unlike(folder: Path, reference: Path) -> list[str]:
    """The differences between a killed run and an undisturbed one; empty if they are bit-identical.

    The notes of each rank are compared for every time that it processed a micro-batch.
    """
    messages = differences(folder, reference)
    own, other = (path.with_name(f"{path.name}-notes") for path in (folder, reference))
    files = sorted(path.name for path in other.glob("rank*.jsonl"))
    for name in files:
        wanted = {note["number"]: note for note in read(other / name)}
        assert sorted(wanted) == list(range(EPOCHS * PER_EPOCH)), f"{name} of the reference"
        done = defaultdict(list)
        for note in read(own / name):
            done[note["number"]].append(note)
        messages += [f"{name}: micro-batch {number} is missing" for number in wanted.keys() - done.keys()]
        for number, notes in sorted(done.items()):
            for note in notes:
                messages += [
                    f"{name}: {key} of micro-batch {number} differs" for key in note if note[key] != wanted[number][key]
                ]
    messages += [
        f"{path}: a loader process has used its global random state"
        for path in (own, other)
        if any(note["drawn"] for note in read(path / "loaders.jsonl"))
    ]
    left = {path.name for path in folder.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"}
    return messages + [f"{name} is left over" for name in sorted(left)]


def drawn_kills(seed: str, *, accumulate: int = 1, ranks: int = 1, workers: int = 0, count: int = 3) -> list[str]:
    """Kills at random micro-batches, moments and by random signals, far enough apart that each one happens."""
    chance, kills = random.Random(seed), []
    stretch = EPOCHS * PER_EPOCH // count
    for number in range(count):
        place = number * stretch + chance.randrange(max(1, stretch - 2 * accumulate))
        moment = chance.choice(["forward", "backward", "batch"])
        how = chance.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGUSR1", "SIGINT", "raise"])
        where = f" on {chance.randrange(ranks)}" if ranks > 1 else ""
        kills.append(f"{moment}@{place}={how}{where}".removesuffix(" on 0"))
    return kills


def write_shards(folder: Path, *, count: int, images: int) -> str:
    """Shards of noise for `data.shards`."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for shard in range(count):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
            for number in range(images):
                content = io.BytesIO()
                Image.fromarray(noise.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(content, format="png")
                info = tarfile.TarInfo(f"{shard}-{number:03}.png")
                info.size = len(content.getvalue())
                tar.addfile(info, io.BytesIO(content.getvalue()))
    return f"{folder}/s-{{0..{count - 1}}}.tar"


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of notes."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
