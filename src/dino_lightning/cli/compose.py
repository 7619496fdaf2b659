"""The configuration of a training run in a program of one's own, such as a notebook: `compose`."""

import time

import hydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dino_lightning.cli.errors import message_for
from dino_lightning.cli.overrides import prepare_overrides
from dino_lightning.config import TrainConfig, register
from dino_lightning.config.conf_dir import CONF
from dino_lightning.errors import UserError
from dino_lightning.training import preflight
from dino_lightning.training.autoconfig.apply import autoconfigure


def compose(*words: str) -> TrainConfig:
    """The configuration of `python train.py WORDS`, checked as there.

        config = compose("method=byol", "trainer.max_epochs=2")

    `dino_lightning.training.build` makes data module, LightningModule and trainer of it. Images are looked at only
    where the words ask for settings by them, as `data.path=~/photos` alone does. Nothing is written. `output_dir` is
    named after the clock unless a word names it. Raises `UserError` for what the command line refuses.
    """
    register()
    # Not the command line's, which keeps one name for all processes of a run: a program may compose several runs.
    OmegaConf.register_new_resolver("run_name", lambda: time.strftime("%Y%m%d-%H%M%S"), replace=True)
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            given = prepare_overrides(list(words))
            composed = hydra.compose("config", overrides=given)
        autoconfigure(composed, cli_overrides=given)
        config = preflight.typed_config(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(message_for(error, conf=CONF)) from error
    preflight.check_combinations(config)
    return config
