"""One training run from configuration to summary, in its order."""

import atexit
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from dino_lightning.checkpoints import export_backbone
from dino_lightning.checkpoints.run_checkpoint import newest_whole
from dino_lightning.config import TrainConfig, WandbLoggerConfig
from dino_lightning.config.checks.training import check_config, check_data
from dino_lightning.config.constraints import check_keys
from dino_lightning.data.module import MultiCropDataModule
from dino_lightning.errors import UserError
from dino_lightning.loggers.wandb import LastingWandbLogger, closed_wandb
from dino_lightning.methods.base import Method
from dino_lightning.report import results_table, write_report
from dino_lightning.runtime.collectives import leave_group, trains_on_cpu
from dino_lightning.runtime.console import quieten_libraries
from dino_lightning.runtime.environment import check_environment, check_port
from dino_lightning.runtime.files import FAILED, commit, environment, write_atomically
from dino_lightning.runtime.memory import keep_freed_memory
from dino_lightning.runtime.run_lock import held_folder
from dino_lightning.runtime.scheduler import resume_mode
from dino_lightning.runtime.sharding import whole_state
from dino_lightning.training.autoconfig.apply import show, suggest_settings
from dino_lightning.training.build import build_data, build_method, build_trainer
from dino_lightning.training.callbacks.collapse_alarm import CollapseAlarm
from dino_lightning.training.callbacks.knn import KNNCallback
from dino_lightning.training.callbacks.preemption import LeaveRun
from dino_lightning.training.callbacks.pruning import Pruning
from dino_lightning.training.callbacks.throughput import Speed
from dino_lightning.training.init_from import check_initial
from dino_lightning.training.resources import check_resources
from dino_lightning.training.resume import check_same_run, check_total_batch

C = TypeVar("C", bound=Callback)

LARGE_CROPS = 96
"""Pixels from which a step is long against what its loader does, so that no core is left to the loader."""


def run_training(composed: DictConfig, *, given: Sequence[str] = (), at_once: int | None = None) -> float | None:
    """Train as configured; returns k-NN top-1 in percent (for sweeps), or None where it was not evaluated.

    `given` are the words of the command line, whose keys `suggest=true` leaves as they are. `at_once` runs, which
    a launcher has started side by side, share the cores of this machine.
    """
    with held_folder(composed.output_dir), closed_wandb():
        return _train(composed, given=given, at_once=at_once)


def _train(composed: DictConfig, *, given: Sequence[str], at_once: int | None) -> float | None:
    check_keys(composed)
    suggested = suggest_settings(composed, given=given)
    config = cast(TrainConfig, OmegaConf.to_object(composed))
    check_config(config)
    check_environment(config)
    quieten_libraries()
    L.seed_everything(config.seed, workers=True, verbose=False)
    resolved = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True, enum_to_str=True))

    output = Path(config.output_dir)
    found = newest_whole(output / "checkpoints") if resume_mode(config) else None
    if found is not None:
        check_same_run(resolved, output)
    initial = check_initial(config) if found is None else None
    data = build_data(config)
    step = None if found is None else found[1]["global_step"]
    trainer = build_trainer(config, hyperparameters={**resolved, "environment": environment()}, before_step=step)
    processes = trainer.num_devices * (at_once or 1)
    if at_once is not None and trainer.num_devices > 1:  # processes of a run are started by its own command line
        raise UserError(f"trainer.devices={config.trainer.devices}: runs that joblib starts side by side have one "
                        "device each; set trainer.devices=1, or take another launcher.")  # fmt: skip
    if found is not None:
        check_total_batch(resolved, output, ranks_before=len(found[1].get("ranks", [0])), ranks=trainer.world_size)
    check_port(trainer.strategy, world_size=trainer.world_size)
    check_data(config, data, world_size=trainer.world_size)
    if trainer.strategy.root_device.type == "cpu":
        torch.set_num_threads(config.cpu_threads or threads_beside(config, devices=processes))
    torch.set_float32_matmul_precision(config.step.matmul_precision)
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
            show(suggested)
        introduce(config, data, trainer, method)

    checkpoint = None if found is None else str(found[0])
    del found
    atexit.register(leave_group)
    try:
        trainer.fit(method, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except LeaveRun as leave:
        finish_loggers(trainer)
        sys.exit(leave_with(leave, trainer))
    if trainer.interrupted:
        return None
    summary = summarise(config, trainer, method)
    weights = whole_state(cast(nn.Module, method.evaluated.backbone))  # on all ranks: each may hold a part
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


def leave_with(leave: LeaveRun, trainer: L.Trainer) -> int:
    """The exit status of a run that has saved and was told to end."""
    leave_group()
    if leave.then is not None and trainer.is_global_zero:
        leave.then()
    # A launcher that sees another process end with a status kills the first one, which may still ask SLURM.
    return leave.status if trainer.is_global_zero else 0


def threads_beside(config: TrainConfig, *, devices: int) -> int:
    """Threads for each training process on a CPU; `devices` counts those of other runs on this machine, too.

    With small crops each loader process has a core to itself: threads that share one with it wait for each other in
    every small operation, which costs more than a second thread gains.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = config.data.num_workers if config.crops.global_size < LARGE_CROPS else 0
    return max(1, cores // devices - workers)


def trains_in_tiles(config: TrainConfig, method: Method) -> bool:
    """Whether large batches take so little memory at once that freed memory can be kept."""
    return method.student.in_tiles and "mixed" not in str(config.trainer.precision)


def introduce(config: TrainConfig, data: MultiCropDataModule, trainer: L.Trainer, method: Method) -> None:
    """Say in a few lines what is about to happen."""
    val = data.sources.val
    weights = sum(parameter.numel() for parameter in method.student.backbone.parameters())
    batch = config.data.batch_size_per_device * trainer.world_size * config.trainer.accumulate_grad_batches
    console = Console(stderr=True, highlight=False)
    classes = f", {data.num_classes} classes" if data.labelled else ""
    queries = len(val) if val else 0
    console.print(f"[bold]Images[/]    {data.num_images} for training, {queries} as k-NN queries{classes}")
    if data.sources.notice:
        console.print(f"          {data.sources.notice}")
    if config.data.channels != 3:
        console.print(
            f"          {config.data.channels} channels: no saturation, hue and grayscale in the augmentation"
        )
    network = type(method.student.backbone).__name__
    console.print(f"[bold]Network[/]   {network}, {weights / 1e6:.2f} M weights, on {trainer.world_size} "
                  f"{trainer.accelerator.__class__.__name__.removesuffix('Accelerator')}")  # fmt: skip
    normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in method.modules())
    if (
        normed
        and config.trainer.sync_batchnorm
        and trainer.world_size > 1
        and trains_on_cpu(config.trainer.accelerator)
    ):
        console.print("          batch norms see their own process's images: PyTorch shares statistics on GPUs only")
    length = f"{config.trainer.max_epochs} epochs" if config.trainer.max_epochs != -1 else "as many epochs as it takes"
    console.print(f"[bold]Run[/]       {config.experiment}: {length}, total batch {batch}, seed {config.seed}")
    console.print(f"[bold]Output[/]    {escape(config.output_dir)}", soft_wrap=True)


def finish_loggers(trainer: L.Trainer) -> None:
    """Close W&B's run, before a scheduler is asked to start this one again."""
    for logger in trainer.loggers:
        if isinstance(logger, LastingWandbLogger):
            logger.finish()


def conclude_loggers(config: TrainConfig, trainer: L.Trainer, exported: Path) -> None:
    """Give W&B what has been written: `summary.json` and the weights."""
    for logger in trainer.loggers:
        if isinstance(logger, LastingWandbLogger) and isinstance(config.logger, WandbLoggerConfig):
            summary = json.loads((exported.parent / "summary.json").read_text())
            logger.conclude(summary, weights=exported if config.logger.artifacts else None)


def summarise(config: TrainConfig, trainer: L.Trainer, method: Method) -> dict[str, Any]:
    """The run in a few numbers: `summary.json`."""
    knn = find(trainer, KNNCallback)
    speed, alarm, pruning = find(trainer, Speed), find(trainer, CollapseAlarm), find(trainer, Pruning)
    bad_images = [file.read_text().splitlines() for file in Path(config.output_dir).glob("bad_images*.txt")]
    return {
        "knn_top1": knn.last.get("top1") if knn else None,
        "knn_top5": knn.last.get("top5") if knn else None,
        "knn_top1_untrained": knn.untrained.get("top1") if knn else None,
        "knn_top1_pixels": knn.pixels.get("top1") if knn else None,
        "collapse": alarm.verdict if alarm else None,
        "pruned": pruning.verdict if pruning else None,
        "images_per_second": round(speed.images_per_second, 1) if speed else None,
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "commit": commit(),
        "seed": config.seed,
        "experiment": config.experiment,
        "feature_dim": method.student.backbone.num_features,
        "bad_images": sum(map(len, bad_images)),
    }


def find(trainer: L.Trainer, kind: type[C]) -> C | None:
    """The trainer's callback of a kind."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)  # type: ignore[attr-defined]


def write_results(config: TrainConfig, summary: dict[str, Any], weights: dict[str, Tensor], exported: Path) -> None:
    """The exported weights, `summary.json`, `report.html`, and the table on the screen."""
    output = exported.parent
    recipe = export_backbone(
        weights,
        exported,
        config=config.backbone,
        image_size=config.crops.global_size,
        mean=config.crops.mean,
        std=config.crops.std,
        channels=config.data.channels,
        eval_resize=config.crops.eval_resize,
        eval_size=config.crops.eval_size,
    )
    write_atomically(output / "summary.json", json.dumps({**summary, "timm": recipe}, indent=2) + "\n")
    report = write_report(output)
    console = Console()
    if summary["knn_top1"] is None:
        console.print("No k-NN evaluation in this run: judge it by its pictures and curves.")
    else:
        console.print(results_table(summary))
    if summary["collapse"]:
        console.print(f"A collapse was seen ({summary['collapse']}): docs/collapse.md says what to change.")
    if summary["bad_images"]:
        bad = f"{summary['bad_images']} images could not be read: see bad_images*.txt in {output}"
        console.print(bad, markup=False)
    console.print(f"Pictures and curves: {report}", soft_wrap=True, markup=False)  # one piece can be copied
