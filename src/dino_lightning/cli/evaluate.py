"""`dino eval`, `python -m dino_lightning.cli.evaluate`: one evaluation of one network.

    dino eval checkpoint=outputs/quick-20261124-154205                   k-NN on the built-in images
    dino eval eval=linear checkpoint=… data=imagenet data.path=DIR       the paper's linear evaluation

Exit status: 0; 2 where a setting, a file or the combination is wrong, in one sentence; 1 where some evaluations of a
sweep (`--multirun`) failed, which leaves the others alone.
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
from dino_lightning.cli.errors import EXPLAINED, exit_with_error, refuse_folder, refuse_number, sentence
from dino_lightning.cli.overrides import quote_overrides
from dino_lightning.cli.resolvers import groups, run_name
from dino_lightning.cli.sweeps import Jobs, first_on_machine
from dino_lightning.cli.train import CONF
from dino_lightning.config import register
from dino_lightning.config.paths import usable_path
from dino_lightning.runtime.files import FAILED

PROGRAM = "dino eval"

JOBS = Jobs(PROGRAM)
"""The evaluations of `--multirun`."""


def main() -> None:
    """Entry point of evaluation."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise to us instead of printing and leaving with status 1
    register()
    if asks_for_completion(sys.argv):
        complete_after(quote_overrides)
    sys.argv[1:] = quote_overrides(sys.argv[1:])
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("groups", groups, replace=True)
    try:
        _evaluate()
    except EXPLAINED as error:
        exit_with_error(error, program=PROGRAM)
    except OSError as error:
        refuse_folder(error, program=PROGRAM)
    except OverflowError as error:
        refuse_number(error, program=PROGRAM)
    JOBS.finish()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
def _evaluate(cfg: DictConfig) -> float | None:
    from dino_lightning.evaluation.run import run_evaluation  # loads in seconds: not needed for --help

    hydra_config = HydraConfig.get()
    several = hydra_config.mode == RunMode.MULTIRUN
    try:
        given = hydra_config.runtime.output_dir if several else cfg.output_dir
        cfg.output_dir = str(usable_path("output_dir", given).absolute())
        run = partial(run_evaluation, overrides=list(hydra_config.overrides.task))
        if several:
            if first_on_machine():  # the others learn by it what the first one has seen fail before it started them
                (Path(cfg.output_dir) / FAILED).unlink(missing_ok=True)  # of an attempt before this one
            return JOBS.attempt(run, cfg, sentence=sentence)
        return run(cfg)
    except EXPLAINED as error:
        with suppress(OSError):  # Hydra made the folder; leave it only where something stands in it
            Path(cfg.output_dir).rmdir()
        exit_with_error(error, program=PROGRAM)  # here already: Hydra would print the overrides above the sentence


class SweepStart(Callback):
    """Told by Hydra that a sweep is about to start."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note what stands in its folder."""
        JOBS.begin(Path(config.hydra.sweep.dir))


if __name__ == "__main__":
    import dino_lightning.cli.evaluate

    dino_lightning.cli.evaluate.main()  # of the module that Hydra knows, for there is one list of evaluations
