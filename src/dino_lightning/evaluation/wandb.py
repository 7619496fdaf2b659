"""An evaluation at Weights & Biases: a run of its own, with all results in a table and the weights that they are of."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import wandb
import yaml

from dino_lightning.config import WandbLoggerConfig
from dino_lightning.evaluation.context import Result
from dino_lightning.loggers.wandb import RUN_ID_FILE, FaultTolerantWandbLogger, sweep_name, wandb_logger, weights_name
from dino_lightning.runtime.console import warn

COLUMNS = ["network", "metric", "value", "unit", "main", "details"]


@dataclass(frozen=True)
class TrainingRun:
    """The run at W&B that trained a network."""

    id: str
    project: str
    entity: str | None

    @property
    def weights(self) -> str:
        """The latest version of its artifact, as W&B names it."""
        place = f"{self.entity}/{self.project}" if self.entity else self.project
        return f"{place}/{weights_name(self.id)}:latest"


def training_run(checkpoint: str) -> TrainingRun | None:
    """What the folder of a run, or of a file in it, says about its run at W&B; None where that is nothing."""
    path = Path(checkpoint).expanduser()
    if not path.exists():  # `timm:NAME` is not of the run in whose folder it is evaluated
        return None
    for folder in (path, *path.parents[:2]):
        try:
            run_id = (folder / RUN_ID_FILE).read_text().strip()
            logger = yaml.safe_load((folder / "config.yaml").read_text())["logger"]
            return TrainingRun(run_id, logger["project"], logger.get("entity"))
        except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
            continue
    return None


def start_evaluation(
    config: WandbLoggerConfig,
    *,
    folder: Path,
    checkpoint: str,
    digest: str,
    hyperparameters: dict[str, Any],
    given: Sequence[str],
) -> FaultTolerantWandbLogger:
    """A run of job type `evaluation`, that names the run and the artifact of the weights where `checkpoint` has them.

    It stands in the project of that run, unless `given`, the words of the command line, name another.
    """
    trained = training_run(checkpoint)
    if trained is not None and not any(word.startswith(("logger.project=", "logger.entity=")) for word in given):
        config = replace(config, project=trained.project, entity=trained.entity)
    logger = wandb_logger(
        config, folder=folder, run_id=None, name=folder.name, group=sweep_name(), job_type="evaluation"
    )
    logger.start()
    origin = {"training_run": trained.id if trained else None, "checkpoint_digest": digest}
    logger.log_hyperparams({**hyperparameters, **origin})
    if trained is not None and config.artifacts:
        _use_weights(logger, trained)
    return logger


def _use_weights(logger: FaultTolerantWandbLogger, trained: TrainingRun) -> None:
    run = logger.experiment
    if run.disabled:
        return
    instead = "the config of this run names the run that trained it and the digest of the weights instead"
    if run.offline:
        warn(f"W&B notes offline for no run which artifact it uses; {instead}.")
        return
    try:
        run.use_artifact(trained.weights)
    except Exception as error:
        reason = " ".join(str(error).split())
        warn(f"W&B has no artifact {trained.weights} ({reason}); {instead}.")


def log_results(logger: FaultTolerantWandbLogger, name: str, columns: Sequence[tuple[str, Sequence[Result]]]) -> None:
    """All results of evaluation `name` in a table, and the first network's as numbers, which W&B can chart."""
    rows = [
        [network, result.metric, result.value, result.unit, result.main, json.dumps(result.details)]
        for network, results in columns
        for result in results
    ]
    figures = {f"{name}/{result.metric}": result.value for result in columns[0][1]}
    logger.log_metrics({f"{name}/results": wandb.Table(columns=COLUMNS, data=rows), **figures})  # type: ignore[dict-item]
