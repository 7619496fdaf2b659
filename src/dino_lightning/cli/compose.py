"""The configuration of a training run in a Python program, such as a notebook: `compose`."""

import time

from omegaconf import OmegaConf

from dino_lightning.cli.errors import as_user_errors
from dino_lightning.cli.overrides import prepare_training
from dino_lightning.cli.program import compose_root
from dino_lightning.config import TrainConfig
from dino_lightning.training import preflight
from dino_lightning.training.autoconfig.apply import autoconfigure


def compose(*words: str) -> TrainConfig:
    """The checked configuration of `dino train WORDS`.

        config = compose("method=byol", "trainer.max_epochs=2")

    `dino_lightning.training.build` makes data module, LightningModule and trainer of it. Images are read only if the
    words ask for settings that depend on them, as `data.path=~/photos` alone does. Nothing is written. `output_dir` is
    named after the time unless a word sets it. Raises `UserError` for what the command line refuses.
    """
    # The command line keeps one name for all processes of a run, but a program may compose several runs.
    OmegaConf.register_new_resolver("run_name", lambda: time.strftime("%Y%m%d-%H%M%S"), replace=True)
    with as_user_errors():
        overrides = prepare_training(list(words))
        composed = compose_root("config", overrides)
        autoconfigure(composed, cli_overrides=overrides)
        config = preflight.typed_config(composed)
    preflight.check_combinations(config)
    return config
