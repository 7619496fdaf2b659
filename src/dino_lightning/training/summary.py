"""TODO."""

import json
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from dino_lightning.checkpoints import export_backbone
from dino_lightning.config import TrainConfig
from dino_lightning.data.module import MultiCropDataModule
from dino_lightning.methods.base import Method
from dino_lightning.report import results_table, write_report
from dino_lightning.runtime.devices import trains_on_cpu
from dino_lightning.runtime.files import write_atomically
from dino_lightning.runtime.provenance import commit
from dino_lightning.training.callbacks.collapse_alarm import CollapseAlarm
from dino_lightning.training.callbacks.knn import KNNCallback
from dino_lightning.training.callbacks.pruning import Pruning
from dino_lightning.training.callbacks.throughput import Throughput

C = TypeVar("C", bound=Callback)


def announce(config: TrainConfig, data: MultiCropDataModule, trainer: L.Trainer, method: Method) -> None:
    """Say in a few lines what is about to happen."""
    val = data.sources.val
    weights = sum(parameter.numel() for parameter in method.student.backbone.parameters())
    batch = config.data.batch_size_per_device * trainer.world_size * config.trainer.accumulate_grad_batches
    console = Console(stderr=True, highlight=False)
    classes = f", {data.num_classes} classes" if data.labeled else ""
    queries = len(val) if val else 0
    console.print(f"[bold]Images[/]    {data.num_images} for training, {queries} as k-NN queries{classes}")
    if data.sources.remark:
        console.print(f"          {data.sources.remark}")
    if config.data.channels != 3:
        console.print(
            f"          {config.data.channels} channels: no saturation, hue and grayscale in the augmentation"
        )
    network = type(method.student.backbone).__name__
    console.print(
        f"[bold]Network[/]   {network}, {weights / 1e6:.2f} M weights, on {trainer.world_size} "
        f"{trainer.accelerator.__class__.__name__.removesuffix('Accelerator')}"
    )
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


def summarize(config: TrainConfig, trainer: L.Trainer, method: Method) -> dict[str, Any]:
    """The run in a few numbers: `summary.json`."""
    knn = find_callback(trainer, KNNCallback)
    speed, alarm, pruning = (
        find_callback(trainer, Throughput),
        find_callback(trainer, CollapseAlarm),
        find_callback(trainer, Pruning),
    )
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


def find_callback(trainer: L.Trainer, kind: type[C]) -> C | None:
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
