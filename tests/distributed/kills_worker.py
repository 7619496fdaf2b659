"""A plugin (`imports=[FILE]`) for the runs of `test_kills.py`: ends them at a named moment and logs each rank's data.

The variable `KILL` is `MOMENT@NUMBER=HOW`, followed by ` on RANK` if the rank is not 0.

- Moments whose NUMBER is that of a micro-batch, counted over epochs: `forward`, `backward`, `step`, `batch`.
- Moments whose NUMBER is how often they happened before in this process: `write` (in the middle of a checkpoint),
  `rename` (a checkpoint is written but not renamed), `row` (half of a row of metrics.csv is written), `knn` (a batch of
  the k-NN evaluation), `loader` (a batch in a loader process), `export`, `import` (of this file, before anything is
  built), `exit` (all files are written, and Python exits).
- HOW: the name of a signal that the process sends to itself; `parent`: a loader process sends SIGKILL to its parent;
  `raise`: an unexpected error; `full`: the error of a full disk.

Files in `NOTES`: `rankR.jsonl` has checksums of the crops and of the random states before each micro-batch;
`loaders.jsonl`, whether a loader process has used its global random states; `kills.jsonl`, the kills.
"""

import atexit
import errno
import hashlib
import json
import os
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import get_worker_info

from dino_lightning.checkpoints import run_checkpoint as files
from dino_lightning.data.batches import MultiCropDataset, MultiCropStream
from dino_lightning.loggers import csv as metrics_file
from dino_lightning.runtime.collectives import rank
from dino_lightning.training import build, summary
from dino_lightning.training.callbacks.knn import EvaluationProgress

FORM = re.compile(r"(\w+)@(\d+)=(\w+)(?: on (\d+))?")
KILL = FORM.fullmatch(os.environ.get("KILL", ""))
NOTES = Path(os.environ["NOTES"])
MIDDLE = 20
"""The chunk of a checkpoint that counts as its middle."""
counts: dict[str, int] = {}


def here(moment: str, number: int | None = None) -> bool:
    """Whether to end at this moment; without a number, occurrences are counted."""
    if number is None:
        number = counts[moment] = counts.get(moment, -1) + 1
    return KILL is not None and KILL[1] == moment and int(KILL[2]) == number and int(KILL[4] or 0) == rank()


def end() -> None:
    """End as `KILL` says; returns after signals that are handled later."""
    assert KILL is not None
    note("kills", kill=KILL[0])
    match KILL[3]:
        case "raise":
            raise RuntimeError("an unexpected failure")
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "parent":
            os.kill(os.getppid(), signal.SIGKILL)
        case name:
            os.kill(os.getpid(), getattr(signal, name))


def note(file: str, **values: Any) -> None:
    with (NOTES / f"{file}.jsonl").open("a") as opened:
        opened.write(json.dumps(values) + "\n")


def checksum(*parts: bytes) -> str:
    return hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()


def random_states() -> dict[str, str]:
    """Of this process."""
    return {
        "torch": checksum(torch.get_rng_state().numpy().tobytes()),
        "numpy": checksum(repr(np.random.get_state(legacy=True)[1].tobytes()).encode()),  # type: ignore[union-attr]
        "python": checksum(repr(random.getstate()).encode()),
    }


class Watch(L.Callback):
    """The last callback, without state."""

    def number(self, trainer: Any) -> int:
        return trainer.current_epoch * int(trainer.num_training_batches) + trainer.fit_loop.batch_idx

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        crops = getattr(batch, "crops", batch)
        sums = {"crops": checksum(*(crop.numpy().tobytes() for crop in crops)), **random_states()}
        note(f"rank{trainer.global_rank}", number=self.number(trainer), step=trainer.global_step, **sums)
        if here("forward", self.number(trainer)):
            end()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if here("backward", self.number(trainer)):
            end()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if here("step", self.number(trainer)):
            end()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if here("batch", self.number(trainer)):
            end()


class Draws:
    """Whether a loader process draws random numbers from global generators."""

    start: dict[str, str] | None = None

    def check(self, *, before: bool) -> None:
        if get_worker_info() is None:
            return
        if self.start is None:
            self.start = random_states()
        if not before:
            note("loaders", rank=rank(), drawn=random_states() != self.start)
            if here("loader"):
                end()


draws = Draws()
_getitems, _batches, _rotate = MultiCropDataset.__getitems__, MultiCropStream._batches, files.SafeCheckpointIO._rotate
_write, _save = files._HashingFile.write, metrics_file._AtomicWriter.save
_progress, _export, _callbacks = EvaluationProgress.__call__, summary.export_backbone, build.build_callbacks


def getitems(self: Any, keys: Any) -> Any:
    draws.check(before=True)
    crops = _getitems(self, keys)
    draws.check(before=False)
    return crops


def stream_batches(self: Any, samples: Any) -> Iterator[Any]:
    draws.check(before=True)
    for batch in _batches(self, samples):
        draws.check(before=False)
        yield batch


def write(self: Any, data: Any) -> int:
    self.pieces = getattr(self, "pieces", 0) + 1
    if self.pieces == MIDDLE and here("write"):
        try:
            end()
        except OSError as error:
            self.error = error  # as the original `write` does
            raise
    return _write(self, data)


def rotate(self: Any, path: Path) -> None:
    _rotate(self, path)
    if here("rename"):
        end()


def save(writer: Any) -> None:
    if writer.metrics and here("row"):
        row = metrics_file._to_csv(writer.metrics_keys, writer.metrics, header=False)
        with writer.path.open("a") as file:
            file.write(row[: len(row) // 2])
        end()
    _save(writer)


def progress(self: Any, images: int) -> None:
    if here("knn"):
        end()
    _progress(self, images)


def export(*arguments: Any, **options: Any) -> Any:
    if here("export"):
        end()
    return _export(*arguments, **options)


def at_exit() -> None:
    if here("exit"):
        end()


if here("import"):
    end()
atexit.register(at_exit)

MultiCropDataset.__getitems__ = getitems
MultiCropStream._batches = stream_batches
files._HashingFile.write = write
files.SafeCheckpointIO._rotate = rotate
metrics_file._AtomicWriter.save = save
EvaluationProgress.__call__ = progress
summary.export_backbone = export
build.build_callbacks = lambda *arguments: [*_callbacks(*arguments), Watch()]
