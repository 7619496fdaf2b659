"""One training run from configuration to summary, in its order."""

import atexit
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dino_lightning.checkpoints.run_checkpoint import latest_valid
from dino_lightning.config import TrainConfig, WandbLoggerConfig
from dino_lightning.config.checks.training import check_config
from dino_lightning.config.constraints import check_keys
from dino_lightning.errors import UserError
from dino_lightning.loggers.wandb import FaultTolerantWandbLogger, wandb_session
from dino_lightning.runtime.collectives import leave_group
from dino_lightning.runtime.console import quieten_libraries
from dino_lightning.runtime.environment import check_port
from dino_lightning.runtime.files import FAILED, write_atomically
from dino_lightning.runtime.memory import keep_freed_memory
from dino_lightning.runtime.provenance import environment
from dino_lightning.runtime.run_lock import run_lock
from dino_lightning.runtime.sharding import full_state
from dino_lightning.training.autoconfig.apply import autoconfigure, print_suggestions
from dino_lightning.training.build import build_data, build_method, build_trainer
from dino_lightning.training.callbacks.preemption import Preempted
from dino_lightning.training.init_from import check_initial
from dino_lightning.training.preflight import check_data, check_environment
from dino_lightning.training.resources import check_resources, threads_beside, trains_in_tiles
from dino_lightning.training.resume import check_output_dir, check_same_run, check_total_batch, resume_mode
from dino_lightning.training.summary import announce, summarize, write_results


def train(
    composed: DictConfig, *, cli_overrides: Sequence[str] = (), concurrent_runs: int | None = None
) -> float | None:
    """Train as configured; returns k-NN top-1 in percent (for sweeps), or None where it was not evaluated.

    `given` are the words of the command line, whose keys `auto.data=true` leaves as they are. `at_once` runs, which
    a launcher has started side by side, share the cores of this machine.
    """
    with run_lock(composed.output_dir), wandb_session():
        return _train(composed, cli_overrides=cli_overrides, concurrent_runs=concurrent_runs)


def _train(composed: DictConfig, *, cli_overrides: Sequence[str], concurrent_runs: int | None) -> float | None:
    check_keys(composed)
    suggested = autoconfigure(composed, cli_overrides=cli_overrides)
    config = cast(TrainConfig, OmegaConf.to_object(composed))
    check_config(config)
    check_output_dir(config)
    check_environment(config)
    quieten_libraries()
    L.seed_everything(config.seed, workers=True, verbose=False)
    resolved = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True, enum_to_str=True))

    output = Path(config.output_dir)
    found = latest_valid(output / "checkpoints") if resume_mode(config) else None
    if found is not None:
        check_same_run(resolved, output)
    initial = check_initial(config) if found is None else None
    data = build_data(config)
    step = None if found is None else found[1]["global_step"]
    trainer = build_trainer(config, hyperparameters={**resolved, "environment": environment()}, before_step=step)
    processes = trainer.num_devices * (concurrent_runs or 1)
    if (
        concurrent_runs is not None and trainer.num_devices > 1
    ):  # processes of a run are started by its own command line
        raise UserError(
            f"trainer.devices={config.trainer.devices}: runs that joblib starts side by side have one "
            "device each; set trainer.devices=1, or take another launcher."
        )
    if found is not None:
        check_total_batch(resolved, output, ranks_before=len(found[1].get("ranks", [0])), ranks=trainer.world_size)
    check_port(trainer.strategy, world_size=trainer.world_size)
    check_data(config, data, world_size=trainer.world_size)
    if trainer.strategy.root_device.type == "cpu":
        torch.set_num_threads(config.cpu_threads or threads_beside(config, devices=processes))
    torch.set_float32_matmul_precision(config.compute.matmul_precision)
    method = build_method(config, num_classes=data.num_classes, initial=initial)
    del initial
    check_resources(config, method, processes=processes, first=trainer.is_global_zero)
    if trainer.strategy.root_device.type == "cpu" and trains_in_tiles(config, method):
        keep_freed_memory()
    if trainer.is_global_zero:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "config.yaml", OmegaConf.to_yaml(composed, resolve=True))
        (output / FAILED).unlink(missing_ok=True)  # of an attempt before this one
        if suggested is not None:
            print_suggestions(suggested)
        announce(config, data, trainer, method)

    checkpoint = None if found is None else str(found[0])
    del found
    atexit.register(leave_group)
    try:
        trainer.fit(method, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except Preempted as leave:
        finish_loggers(trainer)
        sys.exit(exit_after_preemption(leave, trainer))
    if trainer.interrupted:
        return None
    summary = summarize(config, trainer, method)
    weights = full_state(cast(nn.Module, method.evaluated.backbone))  # on all ranks: each may hold a part
    if trainer.is_global_zero:
        exported = output / f"{method.evaluated_key}.safetensors"
        try:
            write_results(config, summary, weights, exported)
        except OSError as error:
            raise UserError(
                f"output_dir={output}: the run is at its end, but its results could not be written "
                f"({error.strerror or error}); make room, then resume=true writes them."
            ) from error
        conclude_loggers(config, trainer, exported)
    return summary["knn_top1"]


def exit_after_preemption(leave: Preempted, trainer: L.Trainer) -> int:
    """The exit status of a run that has saved and was told to end."""
    leave_group()
    if leave.then is not None and trainer.is_global_zero:
        leave.then()
    # A launcher that sees another process end with a status kills the first one, which may still ask SLURM.
    return leave.status if trainer.is_global_zero else 0


def finish_loggers(trainer: L.Trainer) -> None:
    """Close W&B's run, before a scheduler is asked to start this one again."""
    for logger in trainer.loggers:
        if isinstance(logger, FaultTolerantWandbLogger):
            logger.finish()


def conclude_loggers(config: TrainConfig, trainer: L.Trainer, exported: Path) -> None:
    """Give W&B what has been written: `summary.json` and the weights."""
    for logger in trainer.loggers:
        if isinstance(logger, FaultTolerantWandbLogger) and isinstance(config.logger, WandbLoggerConfig):
            summary = json.loads((exported.parent / "summary.json").read_text())
            logger.conclude(summary, weights=exported if config.logger.artifacts else None)
