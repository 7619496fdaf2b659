"""A fault of a single rank, as a file for `imports=`: `FAULT` is its kind, `FAULTY` the rank.

The faults are real: missing images, an exception in the middle of a step, a process that is stopped or killed.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

RANK = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
FAULT = os.environ.get("FAULT", "") if os.environ.get("FAULTY") == RANK else ""
STEP = int(os.environ.get("FAULT_STEP", "3"))


def once() -> bool:
    """Whether this is the first time, over all starts of the run."""
    mark = Path(os.environ["MARK"])
    if mark.exists():
        return False
    mark.touch()
    return True


if FAULT == "images" and once():
    os.environ["IMAGES_OF_RANK"] = os.environ["OTHER_IMAGES"]  # `data.path` is `${oc.env:IMAGES_OF_RANK}`

if FAULT == "killed at the start" and once():
    os.kill(os.getpid(), signal.SIGKILL)

if FAULT == "kills the first" and once():
    os.kill(os.getppid(), signal.SIGKILL)

if FAULT in ("error", "killed", "stopped", "noted"):
    from dino_lightning.methods.dino import DINO

    loss = DINO.loss

    def faulty(self: DINO, batch: Any) -> Any:
        if self.global_step == STEP and once():
            match FAULT:
                case "error":
                    raise MemoryError("no memory left for a batch")
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "noted":
                    time.sleep(2)  # gives the test time to act within this step
        return loss(self, batch)

    DINO.loss = faulty  # type: ignore[method-assign]
