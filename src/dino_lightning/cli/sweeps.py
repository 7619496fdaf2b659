"""Many runs by one command (`--multirun`), one after another or side by side. One that fails does not end the others.

Launchers start runs in other processes, so the files in its folder tell what became of a run.
"""

import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dino_lightning.cli.errors import EXPLAINED, message_for
from dino_lightning.errors import UserError
from dino_lightning.runtime.files import FAILED, OVERRIDES, write_atomically
from dino_lightning.runtime.ranks import is_first_on_machine

Job = Callable[[DictConfig], float | None]


class Jobs:
    """The jobs of one command."""

    def __init__(self) -> None:
        self.program = "dino"
        """The command, for messages."""
        self.failed: dict[str, str] = {}
        """Folder -> reason of each job that failed in this process."""
        self.folder: Path | None = None
        """Folder of the sweep."""
        self._previous_failures: dict[Path, Any] = {}

    def begin(self, folder: Path) -> None:
        """Start a sweep in `folder`, whose failures of previous attempts do not count."""
        self.folder = folder.absolute()  # as jobs name theirs
        self._previous_failures = _failures(self.folder)

    def attempt(self, job: Job, cfg: DictConfig, *, overrides: Sequence[str] = ()) -> float | None:
        """The value of a job; None if it fails, which Optuna counts as a failure, with `failed.txt` in its folder.

        `overrides` of this job are saved in its folder. `KeyboardInterrupt` and `SystemExit` end the command.
        """
        folder = Path(cfg.output_dir)
        try:
            if is_first_on_machine():
                (folder / FAILED).unlink(missing_ok=True)  # of a previous attempt; other ranks read it below
                if overrides:
                    folder.mkdir(parents=True, exist_ok=True)
                    write_atomically(folder / OVERRIDES, OmegaConf.to_yaml(OmegaConf.create(list(overrides))))
            return job(cfg)
        except Exception as error:
            # Ranks go through the jobs in step. If one of them failed alone, the others would wait for it in this job
            # while it waits for them in the next, so all have to end. If the first rank has failed here already, it
            # did so before it started this one, and all continue.
            if has_other_ranks() and not (folder / FAILED).exists():
                raise
            self._save_failure(folder, cfg, error)
        gc.collect()  # what the frames of the error held: loader processes, memory of the device
        return None

    def _save_failure(self, folder: Path, cfg: DictConfig, error: Exception) -> None:
        explained = isinstance(error, (*EXPLAINED, FloatingPointError))
        text = message_for(error) if explained else f"{type(error).__name__}: {' '.join(str(error).split())}"
        self.failed[str(folder)] = text
        if not is_first_on_machine():
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.yaml").exists():
            write_atomically(folder / "config.yaml", _yaml(cfg))  # `dino table` reads the experiment's name from it
        trace = "" if explained else "\n" + "".join(traceback.format_exception(error))
        write_atomically(folder / FAILED, f"{text}\n{trace}")
        print(f"{self.program}: {folder}: {text}", file=sys.stderr)

    def failures(self) -> list[str]:
        """Folder and reason of each job that failed, in any process."""
        reasons = dict(self.failed)
        for path, stamp in _failures(self.folder).items() if self.folder else ():
            if self._previous_failures.get(path) != stamp:
                reasons.setdefault(str(path.parent), path.read_text("utf-8", errors="replace").partition("\n")[0])
        return [f"{folder}: {reason}" for folder, reason in sorted(reasons.items(), key=lambda item: _number(item[0]))]

    def finish(self) -> None:
        """If jobs failed, print them and exit with status 1."""
        failures = self.failures()
        if not failures:
            return
        if is_first_on_machine():
            runs = "1 run" if len(failures) == 1 else f"{len(failures)} runs"
            print("\n  ".join([f"{self.program}: {runs} failed:", *failures]), file=sys.stderr)
        sys.exit(1)


JOBS = Jobs()
"""The jobs of this process."""


def has_other_ranks() -> bool:
    """Whether other processes train on the same runs, started by Lightning, torchrun or a scheduler."""
    return "LOCAL_RANK" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1


def concurrent_jobs(launcher: DictConfig) -> int:
    """How many runs joblib starts side by side on this machine; 0 for other launchers."""
    if not str(launcher.get("_target_")).endswith(".JoblibLauncher"):
        return 0
    from joblib import cpu_count

    return launcher.n_jobs if launcher.n_jobs > 0 else max(1, cpu_count() + 1 + launcher.n_jobs)


def in_own_process(job: Callable[..., float | None], cfg: DictConfig, **options: Any) -> float | None:
    """The value of a job that runs in a new process.

    Joblib gives up all runs if one of its own processes is killed, as the system does when memory runs out. If this
    process is killed, only its run has failed.
    """
    from joblib.externals.loky.process_executor import ProcessPoolExecutor, TerminatedWorkerError

    with ProcessPoolExecutor(max_workers=1) as process:
        try:
            arguments = ["dino", "train", *options["cli_overrides"]]
            return process.submit(_start, arguments, _sweep_settings(), partial(job, **options), cfg).result()
        except TerminatedWorkerError as error:
            raise UserError(
                "the process of this run was killed, often for lack of memory; run fewer side by side "
                "(hydra.launcher.n_jobs)."
            ) from error


def _sweep_settings() -> DictConfig | None:
    """Hydra's mode and the folder of the sweep, by which W&B names the group of its runs."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    return OmegaConf.create({"hydra": {"mode": hydra.mode, "sweep": {"dir": hydra.sweep.dir}}})


def _start(arguments: list[str], hydra: DictConfig | None, job: Job, cfg: DictConfig) -> float | None:
    """Call a job in a new process, with the command line that it records and the settings that it asks Hydra for."""
    sys.argv[:] = arguments
    HydraConfig.instance().cfg = hydra  # type: ignore[assignment]
    return job(cfg)


def check_sweeper(config: DictConfig) -> None:
    """Refuse, before the first training run, a search by Optuna for anything but the highest k-NN accuracy."""
    sweeper = config.hydra.sweeper
    if "callbacks" not in config or not str(sweeper.get("_target_")).endswith(".OptunaSweeper"):
        return
    logging.getLogger("optuna").setLevel(logging.WARNING)
    logging.getLogger("hydra_plugins").setLevel(logging.ERROR)  # failed runs say more themselves
    if not config.callbacks.knn.enabled:
        raise UserError(
            "hydra/sweeper=optuna_knn looks for the best k-NN accuracy, and callbacks.knn.enabled=false; "
            "set it to true."
        )
    direction = getattr(sweeper.direction, "name", sweeper.direction)  # the plugin's own default is no text
    if direction != "maximize":
        raise UserError(
            f"hydra.sweeper.direction={direction}: the value is the k-NN accuracy; set it to maximize, as "
            "hydra/sweeper=optuna_knn does."
        )
    for key in ("n_jobs", "n_trials"):
        if sweeper[key] < 1:
            raise UserError(f"hydra.sweeper.{key}={sweeper[key]}: expected a number of runs of at least 1.")


def _failures(folder: Path) -> dict[Path, Any]:
    stamps = {}
    for path in folder.glob(f"*/{FAILED}"):
        status = path.stat()
        stamps[path] = (status.st_mtime_ns, status.st_ino)
    return stamps


def _number(folder: str) -> tuple[int, str]:
    name = Path(folder).name
    return (int(name) if name.isdigit() else 0, folder)


def _yaml(cfg: DictConfig) -> str:
    try:
        return OmegaConf.to_yaml(cfg, resolve=True)
    except OmegaConfBaseException:  # what cannot be resolved may be why the run failed
        return OmegaConf.to_yaml(cfg)
