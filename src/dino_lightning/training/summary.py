"""What a run says before it starts, and what it writes at its end: summary, weights, report."""

import json
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from dino_lightning.checkpoints import Description, export_backbone
from dino_lightning.config import TrainConfig, WandbLoggerConfig
from dino_lightning.data.module import MultiCropDataModule
from dino_lightning.loggers.wandb import FaultTolerantWandbLogger
from dino_lightning.methods.base import Method
from dino_lightning.report import results_table, write_report
from dino_lightning.runtime.devices import trains_on_cpu
from dino_lightning.runtime.files import FAILED, write_atomically
from dino_lightning.runtime.provenance import commit
from dino_lightning.training.autoconfig.apply import AutoconfigResult, print_suggestions
from dino_lightning.training.callbacks.collapse_alarm import CollapseAlarm
from dino_lightning.training.callbacks.knn import KNNCallback
from dino_lightning.training.callbacks.pruning import Pruning
from dino_lightning.training.callbacks.throughput import Throughput
from dino_lightning.training.strategy import has_separate_statistics

C = TypeVar("C", bound=Callback)


def announce(
    config: TrainConfig,
    composed: DictConfig,
    data: MultiCropDataModule,
    trainer: L.Trainer,
    method: Method,
    suggestions: AutoconfigResult | None,
) -> None:
    """Write `config.yaml`, and print what is about to be trained."""
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "config.yaml", OmegaConf.to_yaml(composed, resolve=True))
    (output / FAILED).unlink(missing_ok=True)  # from an earlier attempt
    if suggestions is not None:
        print_suggestions(suggestions)
    console = Console(stderr=True, highlight=False)
    queries = len(data.sources.val) if data.sources.val else 0
    classes = f", {data.num_classes} classes" if data.labeled else ""
    console.print(f"[bold]Images[/]    {data.num_images} for training, {queries} as k-NN queries{classes}")
    if data.sources.remark:
        console.print(f"          {escape(data.sources.remark)}", soft_wrap=True)
    if config.data.channels != 3:
        console.print(
            f"          {config.data.channels} channels: no saturation, hue and grayscale in the augmentation"
        )
    backbone, accelerator = method.student.backbone, type(trainer.accelerator).__name__.removesuffix("Accelerator")
    weights = sum(parameter.numel() for parameter in backbone.parameters())
    network = f"{type(backbone).__name__}, {weights / 1e6:.2f} M weights"
    console.print(f"[bold]Network[/]   {network}, on {trainer.world_size} {accelerator}")
    on_several_cpus = trainer.world_size > 1 and trains_on_cpu(config.trainer.accelerator)
    if on_several_cpus and config.trainer.sync_batchnorm and has_separate_statistics(method):
        console.print(
            "          batch norms use the images of their own process: PyTorch synchronizes them on GPUs only"
        )
    length = f"{config.trainer.max_epochs} epochs" if config.trainer.max_epochs != -1 else "as many epochs as needed"
    batch = config.data.batch_size_per_device * trainer.world_size * config.trainer.accumulate_grad_batches
    console.print(f"[bold]Run[/]       {config.experiment}: {length}, total batch {batch}, seed {config.seed}")
    console.print(f"[bold]Output[/]    {escape(config.output_dir)}", soft_wrap=True)


def summarize(config: TrainConfig, trainer: L.Trainer, method: Method) -> dict[str, Any]:
    """The run in a few numbers, for `summary.json`."""
    knn, throughput = find_callback(trainer, KNNCallback), find_callback(trainer, Throughput)
    alarm, pruning = find_callback(trainer, CollapseAlarm), find_callback(trainer, Pruning)
    bad_images = [file.read_text().splitlines() for file in Path(config.output_dir).glob("bad_images*.txt")]
    return {
        "knn_top1": knn.last.get("top1") if knn else None,
        "knn_top5": knn.last.get("top5") if knn else None,
        "knn_top1_untrained": knn.untrained.get("top1") if knn else None,
        "knn_top1_pixels": knn.pixels.get("top1") if knn else None,
        "collapse": alarm.verdict if alarm else None,
        "pruned": pruning.verdict if pruning else None,
        "images_per_second": round(throughput.images_per_second, 1) if throughput else None,
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "commit": commit(),
        "seed": config.seed,
        "experiment": config.experiment,
        "feature_dim": method.student.backbone.num_features,
        "bad_images": sum(map(len, bad_images)),
    }


def find_callback(trainer: L.Trainer, kind: type[C]) -> C | None:
    """The trainer's callback of this type."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)  # type: ignore[attr-defined]


def write_results(config: TrainConfig, summary: dict[str, Any], weights: dict[str, Tensor], weights_file: Path) -> None:
    """Write the exported weights, `summary.json` and `report.html`; print the table of results."""
    output = weights_file.parent
    timm_arguments = export_backbone(weights, weights_file, Description.of_run(config))
    write_atomically(output / "summary.json", json.dumps({**summary, "timm": timm_arguments}, indent=2) + "\n")
    report = write_report(output)
    console = Console()
    if summary["knn_top1"] is None:
        console.print("No k-NN evaluation in this run: judge it by its pictures and curves.")
    else:
        console.print(results_table(summary))
    if summary["collapse"]:
        console.print(f"A collapse was detected ({summary['collapse']}): see docs/collapse.md for what to change.")
    if summary["bad_images"]:
        console.print(
            f"{summary['bad_images']} images could not be read: see bad_images*.txt in {output}", markup=False
        )
    console.print(f"Pictures and curves: {report}", soft_wrap=True, markup=False)  # not wrapped: a path can be copied


def upload_results(config: TrainConfig, trainer: L.Trainer, weights_file: Path) -> None:
    """Send `summary.json` and, with `logger.artifacts`, the exported weights to W&B."""
    for logger in trainer.loggers:
        if isinstance(logger, FaultTolerantWandbLogger) and isinstance(config.logger, WandbLoggerConfig):
            summary = json.loads((weights_file.parent / "summary.json").read_text())
            logger.log_summary(summary, weights=weights_file if config.logger.artifacts else None)


def finish_loggers(trainer: L.Trainer) -> None:
    """Close the W&B run before a scheduler restarts it."""
    for logger in trainer.loggers:
        if isinstance(logger, FaultTolerantWandbLogger):
            logger.finish()
