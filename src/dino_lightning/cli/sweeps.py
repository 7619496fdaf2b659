"""Many runs by one command (`--multirun`), one after another or side by side: one that fails leaves the others alone.

Launchers start runs in other processes, so what becomes of a run is known by the files in its folder.
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

from dino_lightning.errors import UserError
from dino_lightning.runtime.files import FAILED, OVERRIDES, write_atomically

Job = Callable[[DictConfig], float | None]


class Jobs:
    """The jobs of one command."""

    def __init__(self, program: str = "dino-lightning") -> None:
        self.program = program
        """Who speaks of them."""
        self.failed: dict[str, str] = {}
        """Folder -> reason of each job that failed in this process."""
        self.folder: Path | None = None
        """Folder of the sweep."""
        self._stale: dict[Path, Any] = {}

    def begin(self, folder: Path) -> None:
        """Take note of what stands in the folder of a sweep: failures of an attempt before this one do not count."""
        self.folder = folder.absolute()  # as jobs name theirs
        self._stale = _failures(self.folder)

    def attempt(
        self, job: Job, cfg: DictConfig, *, words: Sequence[str] = (), sentence: Callable[[Exception], str | None]
    ) -> float | None:
        """What a job returns; None where it fails, which Optuna takes for that, with `failed.txt` in its folder.

        `words` are what the command and the sweep say of this job; the folder keeps them. `sentence` explains an error
        that a user can cause and returns None for others. `KeyboardInterrupt` and `SystemExit` end the command.
        """
        folder = Path(cfg.output_dir)
        try:
            if words and first_on_machine():
                _keep(folder, words)
            return job(cfg)
        except Exception as error:
            # Processes that train together go through the jobs in step. If one of them failed alone, the others would
            # wait for it in this job while it waited for them in the next, so that all have to end. If the first
            # process has failed here already, it did so before it started this one, and all go on.
            if in_step_with_others() and not (folder / FAILED).exists():
                raise
            self._note(folder, cfg, error, reason=sentence(error))
        gc.collect()  # what the frames of the error held: loader processes, memory of the device
        return None

    def _note(self, folder: Path, cfg: DictConfig, error: Exception, *, reason: str | None) -> None:
        words = reason or f"{type(error).__name__}: {' '.join(str(error).split())}"
        self.failed[str(folder)] = words
        if not first_on_machine():
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.yaml").exists():
            # By it `dino table` knows which experiment this was.
            write_atomically(folder / "config.yaml", _yaml(cfg))
        trace = "" if reason else "\n" + "".join(traceback.format_exception(error))
        write_atomically(folder / FAILED, f"{words}\n{trace}")
        print(f"{self.program}: {folder}: {words}", file=sys.stderr)

    def failures(self) -> list[str]:
        """Folder and reason of each job that failed, in whatever process."""
        found = dict(self.failed)
        for path, stamp in _failures(self.folder).items() if self.folder else ():
            if self._stale.get(path) != stamp:
                found.setdefault(str(path.parent), path.read_text("utf-8", errors="replace").partition("\n")[0])
        return [f"{folder}: {words}" for folder, words in sorted(found.items(), key=lambda one: _place(one[0]))]

    def finish(self) -> None:
        """Name the jobs that failed and leave with status 1, if there are any."""
        failures = self.failures()
        if not failures:
            return
        if first_on_machine():
            runs = "1 run" if len(failures) == 1 else f"{len(failures)} runs"
            print("\n  ".join([f"{self.program}: {runs} failed:", *failures]), file=sys.stderr)
        sys.exit(1)


def first_on_machine() -> bool:
    """Whether this process is the one of its machine that writes."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def in_step_with_others() -> bool:
    """Whether other processes train on the same runs, started by Lightning, torchrun or a scheduler."""
    return "LOCAL_RANK" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1


def runs_at_once(launcher: DictConfig) -> int:
    """How many runs joblib starts side by side on this machine; 0 where it is not the launcher."""
    if not str(launcher.get("_target_")).endswith(".JoblibLauncher"):
        return 0
    from joblib import cpu_count

    return launcher.n_jobs if launcher.n_jobs > 0 else max(1, cpu_count() + 1 + launcher.n_jobs)


def in_own_process(job: Callable[..., float | None], cfg: DictConfig, **options: Any) -> float | None:
    """What a job returns, from a process of its own.

    Joblib gives up all runs where one of its own processes is killed, as the system does for want of memory. In this
    one it is a run that failed.
    """
    from joblib.externals.loky.process_executor import ProcessPoolExecutor, TerminatedWorkerError

    with ProcessPoolExecutor(max_workers=1) as process:
        try:
            arguments = ["train.py", *options["given"]]
            return process.submit(_started, arguments, _asked_of_hydra(), partial(job, **options), cfg).result()
        except TerminatedWorkerError as error:
            raise UserError(
                "the process of this run was killed, which is often the lack of memory; run fewer side by "
                "side (hydra.launcher.n_jobs)."
            ) from error


def _asked_of_hydra() -> DictConfig | None:
    """What a run asks Hydra for, resolved: its sweep, after which W&B names its group."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    return OmegaConf.create({"hydra": {"mode": hydra.mode, "sweep": {"dir": hydra.sweep.dir}}})


def _started(arguments: list[str], hydra: DictConfig | None, job: Job, cfg: DictConfig) -> float | None:
    """A run writes down its command line, which is that of joblib in this process, where Hydra knows nothing."""
    sys.argv[:] = arguments
    HydraConfig.instance().cfg = hydra  # type: ignore[assignment]
    return job(cfg)


def check_sweeper(config: DictConfig) -> None:
    """Refuse, before the first run, a search by Optuna for something else than high k-NN accuracies."""
    sweeper = config.hydra.sweeper
    if not str(sweeper.get("_target_")).endswith(".OptunaSweeper"):
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
            f"hydra.sweeper.direction={direction}: the figure is the k-NN accuracy; set it to maximize, as "
            "hydra/sweeper=optuna_knn does."
        )
    for key in ("n_jobs", "n_trials"):
        if sweeper[key] < 1:
            raise UserError(f"hydra.sweeper.{key}={sweeper[key]}: expected a number of runs of at least 1.")


def _keep(folder: Path, words: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / OVERRIDES, OmegaConf.to_yaml(OmegaConf.create(list(words))))


def _failures(folder: Path) -> dict[Path, Any]:
    stamps = {}
    for path in folder.glob(f"*/{FAILED}"):
        status = path.stat()
        stamps[path] = (status.st_mtime_ns, status.st_ino)
    return stamps


def _place(folder: str) -> tuple[int, str]:
    name = Path(folder).name
    return (int(name) if name.isdigit() else 0, folder)


def _yaml(cfg: DictConfig) -> str:
    try:
        return OmegaConf.to_yaml(cfg, resolve=True)
    except OmegaConfBaseException:  # what cannot be resolved may be why the run failed
        return OmegaConf.to_yaml(cfg)
