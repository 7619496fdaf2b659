"""What a run of a sweep needs in order to be compared with the others."""

from importlib.util import find_spec
from pathlib import Path

from dino_lightning.config import TrainConfig
from dino_lightning.errors import UserError


def check_pruning(config: TrainConfig) -> None:
    """Refuse to compare without figures, without other runs, or without Optuna."""
    if not config.callbacks.pruning.enabled:
        return
    if not config.callbacks.knn.enabled:
        raise UserError(
            "callbacks.pruning.enabled=true compares k-NN accuracies, and callbacks.knn.enabled=false; set "
            "one of them to the other's value."
        )
    if not Path(config.output_dir).name.isdigit():
        raise UserError(
            "callbacks.pruning.enabled=true compares the runs of a sweep, and this is none; add "
            "--multirun, or callbacks.pruning.enabled=false."
        )
    if find_spec("optuna") is None:
        raise UserError(
            "callbacks.pruning.enabled=true needs the package optuna: pip install "
            '"dino-lightning[optuna]", or set it to false.'
        )
