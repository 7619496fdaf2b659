"""The command line: `python train.py` and `dino train`.

Hydra composes the configuration; here it becomes dataclasses, and every error that a user can cause becomes one
sentence and exit status 2.
"""

import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dino_lightning.cli.completion import asks_for_completion, complete_after
from dino_lightning.cli.errors import (
    EXPLAINED,
    exit_after_lost_rank,
    exit_with_error,
    refuse_folder,
    refuse_number,
    sentence,
)
from dino_lightning.cli.overrides import prepare_overrides
from dino_lightning.cli.plugins import import_one, with_imports
from dino_lightning.cli.resolvers import groups, run_name
from dino_lightning.cli.sweeps import Jobs, check_sweeper, in_own_process, runs_at_once
from dino_lightning.config import register
from dino_lightning.config.conf_dir import CONF
from dino_lightning.config.paths import usable_path
from dino_lightning.errors import UserError
from dino_lightning.runtime import signals as outside_training
from dino_lightning.runtime.scheduler import INTERRUPTED, PREEMPTED

REPLAY = "replay"
"""First word of the command that shows a step that was not finite once more."""

JOBS = Jobs()
"""The runs of `--multirun`."""


def train() -> None:
    """Entry point of training."""
    outside_training.install_early_handlers()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise to us instead of printing and leaving with status 1
    register()
    try:
        sys.argv[1:] = with_imports(sys.argv[1:])
        if sys.argv[1:2] == [REPLAY]:
            from dino_lightning.training.debug.replay import main  # torch and lightning load in seconds

            sys.exit(main([word for word in sys.argv[2:] if not word.startswith("imports=")]))
        if asks_for_completion(sys.argv):
            complete_after(partial(prepare_overrides, fast=False))  # to look for a GPU takes seconds
        sys.argv[1:] = prepare_overrides(sys.argv[1:])
    except UserError as error:
        exit_with_error(error)
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("groups", groups, replace=True)
    try:
        _train()
    except EXPLAINED as error:
        exit_with_error(error)
    except OSError as error:
        refuse_folder(error)
    except OverflowError as error:
        refuse_number(error)
    except ValueError as error:
        if str(error).startswith("Only one of --run"):  # Hydra's
            exit_with_error(UserError(f"{error}."))
        if "No trials are completed" not in str(error):  # Optuna's, where all runs have failed
            raise
    except SystemExit as left:
        if left.code in (PREEMPTED, INTERRUPTED):
            # All is saved and closed. To take the libraries apart can take Python ten seconds, of the few that a
            # scheduler gives.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(left.code)
        raise
    JOBS.finish()
    outside_training.ignore_at_shutdown()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _train(cfg: DictConfig) -> float | None:
    words = list(HydraConfig.get().overrides.task)
    run, several = partial(train_one, given=words), HydraConfig.get().mode == RunMode.MULTIRUN
    if several and (at_once := runs_at_once(HydraConfig.get().launcher)):
        run = partial(in_own_process, train_one, given=words, at_once=at_once)
    try:
        # With several jobs, the numbered folder of this one. The processes of the other devices, which Lightning starts
        # once with the same arguments, go through the same jobs in step.
        given = HydraConfig.get().runtime.output_dir if several else cfg.output_dir
        cfg.output_dir = str(usable_path("output_dir", given).absolute())
        return JOBS.attempt(run, cfg, words=words, sentence=sentence) if several else run(cfg)
    except EXPLAINED as error:
        with suppress(OSError):  # Hydra made the folder; leave it only where something stands in it
            Path(cfg.output_dir).rmdir()
        exit_with_error(error)  # here already: Hydra would print the overrides above the sentence
    except FloatingPointError as error:  # of all ranks at the same step
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(f"dino-lightning: {error}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        from dino_lightning.runtime.collectives import another_rank_is_lost

        if another_rank_is_lost(error):
            exit_after_lost_rank(error)
        raise


def train_one(cfg: DictConfig, **options: Any) -> float | None:
    """`run_training`, in whatever process: in one that has just been started nothing is known of resolvers and files of
    one's own."""
    register()
    for name in cfg.imports:
        import_one(name)
    from dino_lightning.training.run import train  # torch and lightning load in seconds: not needed for --help

    return train(cfg, **options)


class SweepStart(Callback):
    """Told by Hydra that a sweep is about to start."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse what no run of it could change, and note what stands in its folder."""
        try:
            check_sweeper(config)
        except UserError as error:
            exit_with_error(error)
        JOBS.begin(Path(config.hydra.sweep.dir))
