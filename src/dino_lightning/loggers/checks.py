"""Checks before the run that the logger can start."""

import os
from importlib.util import find_spec

from dino_lightning.config import LoggerConfig, TensorBoardLoggerConfig, WandbLoggerConfig
from dino_lightning.config.loggers import WANDB_MODES
from dino_lightning.errors import UserError, did_you_mean

WANDB_MODE_VARIABLE = (*WANDB_MODES, "shared", "dryrun", "run")


def check_logger(logger: LoggerConfig) -> None:
    """Raise `UserError` if the logger cannot start. An unreachable W&B server is no error: the run is then offline."""
    mode = os.environ.get("WANDB_MODE", "")
    if isinstance(logger, TensorBoardLoggerConfig) and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise UserError(
            "logger=tensorboard needs the package tensorboard; install it (pip install tensorboard), or choose "
            "logger=csv."
        )
    if isinstance(logger, WandbLoggerConfig) and mode and mode not in WANDB_MODE_VARIABLE:
        raise UserError(
            f"WANDB_MODE={mode}: correct or unset this environment variable; {did_you_mean(mode, WANDB_MODE_VARIABLE)}"
        )
