"""Many runs by one command (`--multirun`): one that fails leaves the others alone."""

import gc
import math
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class Jobs:
    """The jobs of one command."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        """Folder and reason of each job that failed."""

    def attempt(
        self, job: Callable[[DictConfig], float | None], cfg: DictConfig, *, sentence: Callable[[Exception], str | None]
    ) -> float | None:
        """What a job returns; NaN where it fails, with `failed.txt` in its folder.

        `sentence` explains an error that a user can cause and returns None for others. `KeyboardInterrupt` and
        `SystemExit` end the command.
        """
        from dino_lightning.records import FAILED  # loads torch, as the job does: not needed for --help

        folder = Path(cfg.output_dir)
        try:
            return job(cfg)
        except Exception as error:
            # Processes that train together go through the jobs in step. If one of them failed alone, the others would
            # wait for it in this job while it waited for them in the next, so that all have to end. If the first
            # process has failed here already, it did so before it started this one, and all go on.
            if in_step_with_others() and not (folder / FAILED).exists():
                raise
            self._note(folder, cfg, error, reason=sentence(error))
        gc.collect()  # what the frames of the error held: loader processes, memory of the device
        return math.nan

    def _note(self, folder: Path, cfg: DictConfig, error: Exception, *, reason: str | None) -> None:
        words = reason or f"{type(error).__name__}: {' '.join(str(error).split())}"
        self.failed.append(f"{folder}: {words}")
        if int(os.environ.get("LOCAL_RANK", "0")):
            return
        from dino_lightning.records import FAILED, write_atomically

        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.yaml").exists():
            # By it `dino-table` knows which experiment this was.
            write_atomically(folder / "config.yaml", _yaml(cfg))
        trace = "" if reason else "\n" + "".join(traceback.format_exception(error))
        write_atomically(folder / FAILED, f"{words}\n{trace}")
        print(f"dino-lightning: {self.failed[-1]}", file=sys.stderr)

    def finish(self) -> None:
        """Name the jobs that failed and leave with status 1, if there are any."""
        if not self.failed:
            return
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            runs = "1 run" if len(self.failed) == 1 else f"{len(self.failed)} runs"
            print("\n  ".join([f"dino-lightning: {runs} failed:", *self.failed]), file=sys.stderr)
        sys.exit(1)


def in_step_with_others() -> bool:
    """Whether other processes train on the same runs, started by Lightning, torchrun or a scheduler."""
    return "LOCAL_RANK" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1


def _yaml(cfg: DictConfig) -> str:
    try:
        return OmegaConf.to_yaml(cfg, resolve=True)
    except OmegaConfBaseException:  # what cannot be resolved may be why the run failed
        return OmegaConf.to_yaml(cfg)
