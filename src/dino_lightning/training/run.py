"""One training run, from the configuration to the summary."""

import atexit
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import lightning as L
import torch
from omegaconf import DictConfig
from torch import nn

from dino_lightning.config import TrainConfig
from dino_lightning.errors import UserError
from dino_lightning.loggers.wandb import wandb_session
from dino_lightning.methods.base import Method
from dino_lightning.runtime.collectives import leave_group
from dino_lightning.runtime.console import quieten_libraries
from dino_lightning.runtime.memory import keep_freed_memory
from dino_lightning.runtime.run_lock import run_lock
from dino_lightning.runtime.sharding import full_state
from dino_lightning.training import preflight
from dino_lightning.training.autoconfig.apply import autoconfigure
from dino_lightning.training.build import build
from dino_lightning.training.callbacks.preemption import Preempted
from dino_lightning.training.resources import cpu_threads, trains_in_tiles
from dino_lightning.training.summary import announce, finish_loggers, summarize, upload_results, write_results


def train(
    composed: DictConfig, *, cli_overrides: Sequence[str] = (), concurrent_runs: int | None = None
) -> float | None:
    """Train as configured; returns the k-NN top-1 accuracy in percent (for sweeps), or None if it was not evaluated.

    `cli_overrides`: keys set on the command line; automatic configuration never changes them. `concurrent_runs`: the
    number of runs that a launcher has started side by side, which share the cores of this machine.
    """
    quieten_libraries()
    with run_lock(composed.output_dir), wandb_session():
        suggestions = autoconfigure(composed, cli_overrides=cli_overrides)
        config = preflight.typed_config(composed)
        L.seed_everything(config.seed, workers=True, verbose=False)
        checkpoint, init_network = preflight.check_settings(config, composed)
        data, trainer, method = build(config, composed, checkpoint=checkpoint, init_network=init_network)
        del init_network  # frees its memory
        preflight.check_built(config, data, trainer, method, checkpoint=checkpoint, concurrent_runs=concurrent_runs)
        limit_threads(config, trainer, method, concurrent_runs=concurrent_runs)
        if trainer.is_global_zero:
            announce(config, composed, data, trainer, method, suggestions)
        atexit.register(leave_group)  # only when the interpreter exits, after everything that needs the group
        path = None if checkpoint is None else str(checkpoint.path)
        try:
            trainer.fit(method, datamodule=data, ckpt_path=path, weights_only=True)
        except Preempted as preempted:
            sys.exit(exit_after_preemption(preempted, trainer))
        return None if trainer.interrupted else finish(config, trainer, method)


def limit_threads(
    config: TrainConfig, trainer: L.Trainer, method: Method, *, concurrent_runs: int | None = None
) -> None:
    """Share the cores of this machine among its training processes and their loader processes, if it trains on them."""
    if trainer.strategy.root_device.type != "cpu":
        return
    processes = trainer.num_devices * (concurrent_runs or 1)
    torch.set_num_threads(config.cpu_threads or cpu_threads(config, processes=processes))
    if trains_in_tiles(config, method):
        keep_freed_memory()


def exit_after_preemption(preempted: Preempted, trainer: L.Trainer) -> int:
    """Close what a preempted run has open, and ask its scheduler for a restart; returns the exit status."""
    finish_loggers(trainer)
    leave_group()
    if preempted.restart is not None and trainer.is_global_zero:
        preempted.restart()
    # A launcher kills the first process when another one exits with an error, and the first may still talk to SLURM.
    return preempted.status if trainer.is_global_zero else 0


def finish(config: TrainConfig, trainer: L.Trainer, method: Method) -> float | None:
    """Write the summary, the exported weights and the report of a finished run; returns its k-NN top-1 accuracy."""
    summary = summarize(config, trainer, method)
    weights = full_state(cast(nn.Module, method.evaluated.backbone))  # on all ranks: each may hold a part
    if trainer.is_global_zero:
        weights_file = Path(config.output_dir) / f"{method.evaluated_key}.safetensors"
        try:
            write_results(config, summary, weights, weights_file)
        except OSError as error:
            raise UserError(
                f"output_dir={config.output_dir}: the run has finished, but its results could not be written "
                f"({error.strerror or error}); free disk space, then resume=true writes them."
            ) from error
        upload_results(config, trainer, weights_file)
    return summary["knn_top1"]
