"""One evaluation from configuration to results, in its order."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape

from dino_lightning.checkpoints import load_network, with_fresh_weights
from dino_lightning.config import (
    SCHEMAS,
    AttentionEval,
    ClassificationEval,
    CopyDetectionEval,
    DataConfig,
    EvaluateConfig,
    FinetuneEval,
    KNNEval,
    LinearEval,
    LinearGridEval,
    LogisticEval,
    NeighborsEval,
    RetrievalEval,
    VideoEval,
    WandbLoggerConfig,
)
from dino_lightning.config.checks.evaluation import check_evaluation
from dino_lightning.config.constraints import check_keys
from dino_lightning.errors import UserError
from dino_lightning.evaluation.attention import attention
from dino_lightning.evaluation.classification import finetune, knn, linear, logistic, neighbors
from dino_lightning.evaluation.classification import linear_grid as linear_grid
from dino_lightning.evaluation.context import EvalContext, Result, Task, start
from dino_lightning.evaluation.results import ResultsFile, results_table
from dino_lightning.evaluation.retrieval import copy_detection, retrieval
from dino_lightning.evaluation.video import video
from dino_lightning.evaluation.wandb import log_results, start_evaluation
from dino_lightning.loggers.checks import check_logger
from dino_lightning.loggers.wandb import wandb_session
from dino_lightning.models.frozen import FrozenNetwork, check_size
from dino_lightning.runtime.console import quieten_libraries
from dino_lightning.runtime.environment import check_gpus, check_variables
from dino_lightning.runtime.files import check_writable
from dino_lightning.runtime.provenance import environment


def run_evaluation(composed: DictConfig, *, overrides: list[str]) -> float | None:
    """Evaluate as configured; returns the first main figure of the network (for sweeps)."""
    check_keys(composed)
    config = cast(EvaluateConfig, OmegaConf.to_object(composed))
    check_evaluation(config, overrides=overrides)
    check_variables()
    check_gpus(config.trainer.accelerator)
    check_writable("output_dir", Path(config.output_dir))
    check_logger(config.logger)
    quieten_libraries()
    runtime = start(config)
    network = load_network(config.checkpoint, key=config.checkpoint_key, seed=config.seed)
    check_network(config, network)
    networks = (
        [network, with_fresh_weights(network, seed=config.seed)] if config.baseline and network.trained else [network]
    )
    name = next(name for name, schema in SCHEMAS["eval"].items() if type(config.eval) is schema)
    resolved = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True, enum_to_str=True))
    output, made_with = Path(config.output_dir), environment()
    file = ResultsFile(
        output / "results.jsonl", eval=name, checkpoint=config.checkpoint, config=resolved, environment=made_with
    )
    introduce(config, network, runtime)
    with wandb_session():
        logger = None
        if isinstance(config.logger, WandbLoggerConfig) and runtime.is_main:
            logger = start_evaluation(
                config.logger,
                folder=output,
                checkpoint=config.checkpoint,
                digest=network.digest,
                hyperparameters={**resolved, "environment": made_with},
                given=overrides,
            )
        columns = [(each.name, evaluate(config, each, runtime, file)) for each in networks]
        if logger is not None:
            log_results(logger, name, columns)
    if runtime.is_main:
        conclude(config, name, columns)
    return next((result.value for result in columns[0][1] if result.main), None)


def check_network(config: EvaluateConfig, network: FrozenNetwork) -> None:
    """What images and sizes the network takes."""
    channels = config.data.channels if isinstance(config.data, DataConfig) else 3
    if network.channels != channels:
        raise UserError(f"data.channels={channels}: {network.name} takes images of {network.channels} channels.")
    if isinstance(config.eval, ClassificationEval | CopyDetectionEval):
        check_size(network, config.eval.image_size or network.size, key="eval.image_size")


def evaluate(config: EvaluateConfig, network: FrozenNetwork, runtime: EvalContext, file: ResultsFile) -> list[Result]:
    """All results of one network, written down as they come."""
    network.backbone.to(runtime.device)
    cache = Path(config.feature_cache).expanduser() if config.feature_cache else None
    task = Task(network, config.data, runtime, Path(config.output_dir), seed=config.seed, cache=cache)
    started, results = time.monotonic(), []
    for result in evaluation(config, task):
        results.append(result)
        if runtime.is_main:
            file.append(result, task, seconds=time.monotonic() - started)
    return results


def evaluation(config: EvaluateConfig, task: Task) -> Iterator[Result]:
    """The configured evaluation."""
    match config.eval:
        case KNNEval() as eval_config:
            return knn.evaluate(eval_config, task)
        case LinearEval() as eval_config:
            return linear.evaluate(eval_config, task)
        case LinearGridEval() as eval_config:
            return linear_grid.evaluate(eval_config, task)
        case LogisticEval() as eval_config:
            return logistic.evaluate(eval_config, task)
        case FinetuneEval() as eval_config:
            return finetune.evaluate(eval_config, task)
        case RetrievalEval() as eval_config:
            return retrieval.evaluate(eval_config, task)
        case CopyDetectionEval() as eval_config:
            return copy_detection.evaluate(eval_config, task)
        case VideoEval() as eval_config:
            return video.evaluate(eval_config, task)
        case AttentionEval() as eval_config:
            return attention.evaluate(eval_config, task)
        case NeighborsEval() as eval_config:
            return neighbors.evaluate(eval_config, task)
        case _:
            raise TypeError(f"no evaluation for {type(config.eval).__name__}")


def introduce(config: EvaluateConfig, network: FrozenNetwork, runtime: EvalContext) -> None:
    """Say in a few lines what is about to happen."""
    weights = sum(parameter.numel() for parameter in network.backbone.parameters())
    devices = f"{runtime.fabric.world_size} {runtime.device.type.upper()}"
    runtime.say(
        f"[bold]Network[/]   {escape(network.name)}: {type(network.backbone).__name__}, "
        f"{weights / 1e6:.2f} M weights, on {devices}"
    )
    runtime.say(f"[bold]Output[/]    {escape(config.output_dir)}")


def conclude(config: EvaluateConfig, name: str, columns: list[tuple[str, list[Result]]]) -> None:
    """The table, and where everything is."""
    output, console = Path(config.output_dir), Console()
    console.print(results_table(name, columns))
    bad = [line for file in output.glob("bad_images*.txt") for line in file.read_text().splitlines()]
    if bad:
        said = f"{len(bad)} images could not be read and were left out: see bad_images*.txt in {output}"
        console.print(said, markup=False)
    if (output / "pictures").is_dir():
        console.print(f"Pictures: {output / 'pictures'}", soft_wrap=True, markup=False)
    console.print(f"Every figure: {output / 'results.jsonl'}", soft_wrap=True, markup=False)
