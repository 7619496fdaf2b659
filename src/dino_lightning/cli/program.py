"""Runs a verb whose configuration Hydra composes: once, or with `--multirun` many times."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir, version
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dino_lightning.cli.completion import asks_for_completion, complete_after
from dino_lightning.cli.errors import EXPLAINED, as_user_errors, explained
from dino_lightning.cli.exit import exit_after_lost_rank, exit_with_error
from dino_lightning.cli.plugins import with_imports
from dino_lightning.cli.sweeps import JOBS, Job, check_sweeper
from dino_lightning.config import register
from dino_lightning.config.paths import usable_path
from dino_lightning.errors import UserError, cannot_be_written
from dino_lightning.runtime.files import CONF
from dino_lightning.runtime.ranks import is_first_on_machine
from dino_lightning.runtime.scheduler import first_start

Prepare = Callable[[list[str]], list[str]]
"""Makes Hydra's overrides of the words of a command line."""


def run(words: list[str], task: Job, *, verb: str, root: str, prepare: Prepare) -> None:
    """Compose `conf/ROOT.yaml` with the words and call `task`, once or for each job of a sweep.

    Raises `UserError`; exits with status 1 if jobs of a sweep failed.
    """

    def prepare_after_imports(words: list[str]) -> list[str]:
        return prepare(with_imports(words))

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises errors instead of exiting with status 1
    register()
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    JOBS.program = f"dino {verb}"
    if asks_for_completion(words):
        complete_after(prepare_after_imports)
    with as_user_errors(verb=verb):
        overrides = prepare_after_imports(words)
        # Lightning starts the processes of further devices with `sys.argv`; they must make the same choices.
        start = len(sys.argv) - len(words)
        sys.argv[:] = [*(sys.argv[:start] if sys.argv[start:] == words else [sys.argv[0], verb]), *overrides]
        version.setbase("1.3")
        parser = get_args_parser()
        parser.prog = JOBS.program
        arguments = parser.parse_args(overrides)
        try:
            _run_hydra(arguments, parser, task, config_path=str(CONF), config_name=root)
        except ValueError as error:
            if str(error).startswith("Only one of --run"):  # Hydra's
                raise UserError(f"{error}.") from error
            if "No trials are completed" not in str(error):  # Optuna's, after all runs have failed
                raise
    JOBS.finish()


def attempt(job: Job, cfg: DictConfig, *, verb: str, overrides: Sequence[str] = ()) -> float | None:
    """Call `job` with its own `output_dir`; in a sweep, an error of one job does not end the others."""
    program, hydra = f"dino {verb}", HydraConfig.get()
    JOBS.program = program  # a launcher may have started this process
    multirun = hydra.mode == RunMode.MULTIRUN
    try:
        # In a sweep, the numbered folder of this job. Processes of further devices, which Lightning starts once with
        # the same arguments, go through the same jobs in step.
        folder = hydra.runtime.output_dir if multirun else cfg.output_dir
        cfg.output_dir = str(usable_path("output_dir", folder).absolute())
        return JOBS.attempt(job, cfg, overrides=overrides) if multirun else job(cfg)
    except EXPLAINED as error:
        with suppress(OSError):  # Hydra has made the folder; remove it if it is empty
            Path(cfg.output_dir).rmdir()
        exit_with_error(explained(error, verb=verb), program=program)  # Hydra would print the overrides, too
    except FloatingPointError as error:  # of all ranks at the same step
        if is_first_on_machine():
            print(f"{program}: {error}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        from dino_lightning.runtime.collectives import another_rank_is_lost

        if another_rank_is_lost(error):
            exit_after_lost_rank(error, program=program)
        raise


def compose_root(root: str, overrides: list[str]) -> DictConfig:
    """`conf/ROOT.yaml` with overrides, after `imports`."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose(root, overrides=with_imports(overrides))


def run_name() -> str:
    """A name for the run's folder that all its processes and later starts agree on: the scheduler's, or the time of
    the first process."""
    for variable in ("DINO_LIGHTNING_RUN", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        if os.environ.get(variable, "none") != "none":
            return os.environ[variable]
    # Processes that Lightning starts for the other devices inherit it.
    os.environ["DINO_LIGHTNING_RUN"] = time.strftime("%Y%m%d-%H%M%S", time.localtime(first_start()))
    return os.environ["DINO_LIGHTNING_RUN"]


class OutputFolder(Callback):
    """Makes the folder of a run or sweep before Hydra does, to explain why it cannot be made."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the folder of a single run."""
        HydraConfig.instance().set_config(config)  # Hydra does so only later, and the folder's name may refer to it
        _make_folder(config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the folder of a sweep, check its sweeper, and note which jobs have failed there before."""
        try:
            check_sweeper(config)
        except UserError as error:
            exit_with_error(error, program=JOBS.program)
        _make_folder(config.hydra.sweep.dir)
        JOBS.begin(Path(config.hydra.sweep.dir))


def _make_folder(folder: str) -> None:
    try:
        usable_path("output_dir", folder).mkdir(parents=True, exist_ok=True)
    except UserError as error:
        exit_with_error(error, program=JOBS.program)
    except OSError as error:
        exit_with_error(cannot_be_written("output_dir", folder, error), program=JOBS.program)
