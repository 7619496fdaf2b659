"""Runs one evaluation, from its configuration to its results."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from dino_lightning.checkpoints import load_network, with_fresh_weights
from dino_lightning.config import ClassificationEval, DataConfig, EvaluateConfig
from dino_lightning.config.constraints import check_keys
from dino_lightning.evaluation.checks import check_channels, check_evaluation
from dino_lightning.evaluation.context import EvalContext, Result, Task, launch
from dino_lightning.evaluation.registry import Evaluation, find_evaluation
from dino_lightning.evaluation.results import ResultsFile, results_table
from dino_lightning.evaluation.wandb import log_results, start_evaluation
from dino_lightning.loggers.checks import check_logger
from dino_lightning.loggers.wandb import wandb_session
from dino_lightning.models.frozen import FrozenNetwork, check_size
from dino_lightning.runtime.console import quieten_libraries
from dino_lightning.runtime.environment import check_gpus, check_variables
from dino_lightning.runtime.files import check_writable
from dino_lightning.runtime.provenance import environment


def run_evaluation(composed: DictConfig, *, overrides: list[str]) -> float | None:
    """Evaluate as configured; returns the first main figure of the network (the objective of a sweep)."""
    config = check_settings(composed, overrides)
    evaluation = find_evaluation(config.eval)
    quieten_libraries()
    context = launch(config.trainer)
    context.fabric.seed_everything(config.seed, verbose=False)
    context.set_threads(config.cpu_threads, num_nodes=config.trainer.num_nodes)
    network = load_network(config.checkpoint, key=config.checkpoint_key, seed=config.seed)
    check_channels(network, config.data.channels if isinstance(config.data, DataConfig) else 3)
    if isinstance(config.eval, ClassificationEval):
        check_size(network, config.eval.image_size or network.size, key="eval.image_size")
    networks = [network]
    if config.baseline and network.trained:
        networks.append(with_fresh_weights(network, seed=config.seed))
    print_introduction(config, network, context)
    file = ResultsFile(
        Path(config.output_dir) / "results.jsonl",
        eval=evaluation.name,
        checkpoint=config.checkpoint,
        config=cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True, enum_to_str=True)),
        environment=environment(),
    )
    with wandb_session():
        settings = {**file.config, "environment": file.environment}
        logger = start_evaluation(config, network.digest, settings, overrides) if context.is_main else None
        columns = [(each.name, evaluate_network(config, evaluation, each, context, file)) for each in networks]
        if logger is not None:
            log_results(logger, evaluation.name, columns)
    if context.is_main:
        print_results(config, evaluation.name, columns)
    return next((result.value for result in columns[0][1] if result.main), None)


def check_settings(composed: DictConfig, overrides: Sequence[str]) -> EvaluateConfig:
    """The configuration, once everything is checked that needs neither weights nor images."""
    check_keys(composed)
    config = cast(EvaluateConfig, OmegaConf.to_object(composed))
    check_evaluation(config, overrides=overrides)
    check_variables()
    check_gpus(config.trainer.accelerator)
    check_writable("output_dir", Path(config.output_dir))
    check_logger(config.logger)
    return config


def evaluate_network(
    config: EvaluateConfig, evaluation: Evaluation, network: FrozenNetwork, context: EvalContext, file: ResultsFile
) -> list[Result]:
    """All results of one network; each is written to `file` as soon as it is known."""
    network.backbone.to(context.device)
    cache = Path(config.feature_cache).expanduser() if config.feature_cache else None
    task = Task(network, config.data, context, Path(config.output_dir), seed=config.seed, cache=cache)
    start, results = time.monotonic(), []
    for result in evaluation.evaluate(config.eval, task):
        results.append(result)
        if context.is_main:
            file.append(result, task, seconds=time.monotonic() - start)
    return results


def print_introduction(config: EvaluateConfig, network: FrozenNetwork, context: EvalContext) -> None:
    """Print the network, the devices and the output folder."""
    parameters = sum(parameter.numel() for parameter in network.backbone.parameters())
    context.say(
        f"   {network.name}: {type(network.backbone).__name__}, {parameters / 1e6:.2f} M "
        f"weights, on {context.fabric.world_size} {context.device.type.upper()}",
        label="Network",
    )
    context.say(f"    {config.output_dir}", label="Output")


def print_results(config: EvaluateConfig, name: str, columns: list[tuple[str, list[Result]]]) -> None:
    """Print the table of the main results and the paths of all output."""
    output, console = Path(config.output_dir), Console()
    console.print(results_table(name, columns))
    bad_images = sum(len(file.read_text().splitlines()) for file in output.glob("bad_images*.txt"))
    if bad_images:
        message = f"{bad_images} images could not be read and were left out: see bad_images*.txt in {output}"
        console.print(message, markup=False)
    if (output / "pictures").is_dir():
        console.print(f"Pictures: {output / 'pictures'}", soft_wrap=True, markup=False)
    console.print(f"All results: {output / 'results.jsonl'}", soft_wrap=True, markup=False)
