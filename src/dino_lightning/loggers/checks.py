"""TODO."""

import os
from importlib.util import find_spec

from dino_lightning.config import LoggerConfig, TensorBoardLoggerConfig, WandbLoggerConfig
from dino_lightning.errors import UserError, did_you_mean

WANDB_MODES = ("offline", "online", "disabled")


WANDB_MODE_VARIABLE = (*WANDB_MODES, "shared", "dryrun", "run")


def check_logger(logger: LoggerConfig) -> None:
    """Refuse a logger that cannot start. That W&B is out of reach is no reason: the run goes on offline then."""
    match logger:
        case TensorBoardLoggerConfig():
            if not (find_spec("tensorboard") or find_spec("tensorboardX")):
                raise UserError(
                    "logger=tensorboard needs the package tensorboard; install it (pip install "
                    "tensorboard), or choose logger=csv."
                )
        case WandbLoggerConfig():
            _check_wandb(logger)
        case _:
            pass


def _check_wandb(logger: WandbLoggerConfig) -> None:
    if logger.mode not in WANDB_MODES:
        raise UserError(f"logger.mode={logger.mode}: {did_you_mean(logger.mode, WANDB_MODES)}")
    for key in ("start_timeout_s", "end_timeout_s"):
        if (value := getattr(logger, key)) <= 0:
            raise UserError(f"logger.{key}={value}: expected a positive number of seconds.")
    wrong = sorted(set(logger.project) & set("/\\#?%:"))
    if wrong or not 0 < len(logger.project) <= 128:
        reason = f"has a '{wrong[0]}'" if wrong else f"has {len(logger.project)} characters"
        raise UserError(
            f"logger.project={logger.project} {reason}; W&B takes names of 1 to 128 characters without "
            "/ \\ # ? % and :."
        )
    mode = os.environ.get("WANDB_MODE", "")
    if mode and mode not in WANDB_MODE_VARIABLE:
        raise UserError(
            f"WANDB_MODE={mode}: {did_you_mean(mode, WANDB_MODE_VARIABLE)} Correct or unset this environment variable."
        )
