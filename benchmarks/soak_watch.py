"""Read by the runs of `benchmarks/soak.py` with `imports=[FILE]`: tells where they begin and end, and slows them down.

A run writes a line of JSON to the file named in `SOAK_EVENTS` when it begins to train, with the step it goes on from,
and when it has ended. After each micro-batch it sleeps `SOAK_PAUSE` seconds: a soak is about hours, not arithmetic.
"""

import json
import os
import time
from typing import Any

import lightning as L

from dino_lightning.training import build


class SoakWatch(L.Callback):
    """Has no state, and touches none of the run's."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell the step that the run goes on from."""
        _tell("start", step=trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Leave the processor to others."""
        time.sleep(float(os.environ.get("SOAK_PAUSE", "0")))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell that no step is left."""
        _tell("end", step=trainer.global_step)


def _tell(event: str, *, step: int) -> None:
    line = json.dumps({"event": event, "step": step, "pid": os.getpid(), "time": time.time()})
    with open(os.environ["SOAK_EVENTS"], "a") as file:
        file.write(line + "\n")


_callbacks = build.build_callbacks
build.build_callbacks = lambda *given: [*_callbacks(*given), SoakWatch()]
