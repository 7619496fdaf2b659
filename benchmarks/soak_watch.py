"""A plugin (`imports=[FILE]`) for the runs of `benchmarks/soak.py`: records when training starts and ends; slows it.

A run appends a line of JSON to the file named in `SOAK_PROGRESS` when training starts, with the step from which it is
resumed, and when training ends. After each micro-batch it sleeps `SOAK_PAUSE` seconds to leave the CPU to others.
"""

import json
import os
import time
from typing import Any

import lightning as L

from dino_lightning.training import build


class SoakWatch(L.Callback):
    """Has no state and does not change the state of the run."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the step from which the run is resumed."""
        _record("start", step=trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Sleep."""
        time.sleep(float(os.environ.get("SOAK_PAUSE", "0")))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record that training has ended."""
        _record("end", step=trainer.global_step)


def _record(event: str, *, step: int) -> None:
    line = json.dumps({"event": event, "step": step, "pid": os.getpid(), "time": time.time()})
    with open(os.environ["SOAK_PROGRESS"], "a") as file:
        file.write(line + "\n")


_build_callbacks = build.build_callbacks
build.build_callbacks = lambda *arguments: [*_build_callbacks(*arguments), SoakWatch()]
