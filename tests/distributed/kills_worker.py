"""Imported by runs of `test_kills.py` with `imports=[FILE]`: ends them at a named moment, and logs each rank's images.

`KILL` is `MOMENT@NUMBER=HOW`, with ` on RANK` behind it where it is not rank 0.

- Moments with the number of a micro-batch, counted over epochs: `forward`, `backward`, `step`, `batch`.
- Moments with how often they came before in this process: `write` (the middle of a checkpoint), `rename` (a checkpoint
  is written and has not its name yet), `row` (half of a row of metrics.csv is on the disk), `knn` (a batch of the k-NN
  evaluation), `loader` (a batch in a loader process), `export`, `import` (of this file, before anything is built),
  `exit` (all is written, and Python ends).
- How: the name of a signal, which the process sends to itself; `parent`, which a loader process sends its parent as
  SIGKILL; `raise`, an error that nobody foresaw; `full`, what a full disk answers.

Notes: `rankR.jsonl` has, for each micro-batch, checksums of its crops and of the random states before it;
`loaders.jsonl` whether a loader process has drawn from its random states; `kills.jsonl` the kills.
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
from dino_lightning.training import build, run
from dino_lightning.training.callbacks.knn import KNNCallback

FORM = re.compile(r"(\w+)@(\d+)=(\w+)(?: on (\d+))?")
KILL = FORM.fullmatch(os.environ.get("KILL", ""))
NOTES = Path(os.environ["NOTES"])
MIDDLE = 20
"""The chunk of a checkpoint that counts as its middle."""
seen: dict[str, int] = {}


def here(moment: str, number: int | None = None) -> bool:
    """Whether to end at this moment; without a number, occurrences are counted."""
    if number is None:
        number = seen[moment] = seen.get(moment, -1) + 1
    return KILL is not None and KILL[1] == moment and int(KILL[2]) == number and int(KILL[4] or 0) == rank()


def end() -> None:
    """End as `KILL` says; returns after signals that are handled later."""
    assert KILL is not None
    note("kills", kill=KILL[0])
    match KILL[3]:
        case "raise":
            raise RuntimeError("a failure that nobody foresaw")
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
_items, _batches, _push_back = MultiCropDataset.__getitems__, MultiCropStream._batches, files.SafeCheckpointIO._rotate
_write, _write_checkpoint, _save = files._HashingFile.write, files.write_checkpoint, metrics_file._AtomicWriter.save
_counter, _export, _callbacks = KNNCallback._counter, run.export_backbone, build.build_callbacks


def items(self: Any, keys: Any) -> Any:
    draws.check(before=True)
    made = _items(self, keys)
    draws.check(before=False)
    return made


def stream_batches(self: Any, samples: Any) -> Iterator[Any]:
    draws.check(before=True)
    for made in _batches(self, samples):
        draws.check(before=False)
        yield made


def write(self: Any, data: Any) -> int:
    self.pieces = getattr(self, "pieces", 0) + 1
    if self.pieces == MIDDLE and here("write"):
        try:
            end()
        except OSError as error:
            self.error = error  # as its own `write` would
            raise
    return _write(self, data)


def push_back(self: Any, path: Path) -> None:
    _push_back(self, path)
    if here("rename"):
        end()


def save(writer: Any) -> None:
    if writer.metrics and here("row"):
        row = metrics_file._to_csv(writer.metrics_keys, writer.metrics, header=False)
        with writer.path.open("a") as file:
            file.write(row[: len(row) // 2])
        end()
    _save(writer)


def counter(self: Any, total: int, **options: Any) -> Any:
    count = _counter(self, total, **options)

    def counted(images: int) -> None:
        if here("knn"):
            end()
        count(images)

    return counted


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

MultiCropDataset.__getitems__ = items
MultiCropStream._batches = stream_batches
files._HashingFile.write = write
files.SafeCheckpointIO._rotate = push_back
metrics_file._AtomicWriter.save = save
KNNCallback._counter = counter
run.export_backbone = export
build.build_callbacks = lambda *given: [*_callbacks(*given), Watch()]
