"""An evaluation at Weights & Biases: a separate run, with all results in a table and a link to the weights."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import wandb
import yaml

from dino_lightning.config import EvaluateConfig, WandbLoggerConfig
from dino_lightning.evaluation.context import Result
from dino_lightning.loggers.wandb import RUN_ID_FILE, FaultTolerantWandbLogger, sweep_name, wandb_logger, weights_name
from dino_lightning.runtime.console import warn

COLUMNS = ["network", "metric", "value", "unit", "main", "details"]


@dataclass(frozen=True)
class TrainingRun:
    """The W&B run that trained a network."""

    id: str
    project: str
    entity: str | None

    @property
    def weights(self) -> str:
        """The name of the latest version of its artifact."""
        project = f"{self.entity}/{self.project}" if self.entity else self.project
        return f"{project}/{weights_name(self.id)}:latest"


def training_run(checkpoint: str) -> TrainingRun | None:
    """The W&B run of a run's folder or a file in it; None if there is none."""
    path = Path(checkpoint).expanduser()
    if not path.exists():  # such as `timm:NAME`; a run in the working folder is unrelated
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
    config: EvaluateConfig, digest: str, hyperparameters: dict[str, Any], overrides: Sequence[str]
) -> FaultTolerantWandbLogger | None:
    """Start a run of job type `evaluation` that refers to the run which trained the checkpoint and to its artifact.

    It belongs to the project of that run, unless `overrides` (of the command line) name another one. None where the
    results go only to `results.jsonl`.
    """
    if not isinstance(config.logger, WandbLoggerConfig):
        return None
    settings, trained, folder = config.logger, training_run(config.checkpoint), Path(config.output_dir)
    if trained is not None and not any(word.startswith(("logger.project=", "logger.entity=")) for word in overrides):
        settings = replace(settings, project=trained.project, entity=trained.entity)
    logger = wandb_logger(
        settings, folder=folder, run_id=None, name=folder.name, group=sweep_name(), job_type="evaluation"
    )
    logger.start()
    origin = {"training_run": trained.id if trained else None, "checkpoint_digest": digest}
    logger.log_hyperparams({**hyperparameters, **origin})
    if trained is not None and settings.artifacts:
        _use_weights(logger, trained)
    return logger


def _use_weights(logger: FaultTolerantWandbLogger, trained: TrainingRun) -> None:
    run = logger.experiment
    instead = "the config of this run contains the training run and the digest of the weights instead"
    if run.offline and not run.disabled:
        warn(f"W&B cannot record used artifacts offline; {instead}.")
    elif not run.disabled:
        try:
            run.use_artifact(trained.weights)
        except Exception as error:
            warn(f"W&B has no artifact {trained.weights} ({' '.join(str(error).split())}); {instead}.")


def log_results(logger: FaultTolerantWandbLogger, name: str, columns: Sequence[tuple[str, Sequence[Result]]]) -> None:
    """Log all results of evaluation `name` as a table, and those of the first network as numbers for charts."""
    rows = [
        [network, result.metric, result.value, result.unit, result.main, json.dumps(result.details)]
        for network, results in columns
        for result in results
    ]
    figures = {f"{name}/{result.metric}": result.value for result in columns[0][1]}
    logger.log_metrics({f"{name}/results": wandb.Table(columns=COLUMNS, data=rows), **figures})  # type: ignore[dict-item]
