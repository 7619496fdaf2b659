"""A DINO method that is small enough to train in a test, and a function that trains it with Lightning."""

from dataclasses import dataclass, field, replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from dino_lightning.config import AdamWConfig, ComputeConfig, DINOConfig, OptimConfig, ViTConfig
from dino_lightning.methods.dino import DINO
from dino_lightning.methods.parts import MethodParts
from dino_lightning.models.backbones import build_backbone
from dino_lightning.optim.ema import follow

PATCH, HEADS, K = 8, 2, 64
BACKBONE = ViTConfig(width=32, depth=1, heads=HEADS, patch_size=PATCH, drop_path_rate=0.0)
Batches = list[list[Tensor]]


def parts(
    backbone: ViTConfig = BACKBONE,
    *,
    teacher: bool = True,
    optim: OptimConfig | None = None,
    batch_size: int = 8,
    compute: ComputeConfig | None = None,
    num_classes: int = 0,
) -> MethodParts:
    """The parts of a tiny method; the student's backbone is initialized before the teacher's."""
    return MethodParts(
        build_backbone(backbone, image_size=32, drop_path=True),
        teacher_backbone=build_backbone(backbone, image_size=32, drop_path=False) if teacher else None,
        feature_dim=backbone.width,
        optim=optim or AdamWConfig(lr=0.032, lr_warmup="0ep"),
        batch_size_per_device=batch_size,
        compute=compute or ComputeConfig(),
        num_classes=num_classes,
    )


def dino(
    *,
    optim: OptimConfig | None = None,
    batch_size: int = 8,
    compute: ComputeConfig | None = None,
    depth: int = BACKBONE.depth,
    **method: Any,
) -> DINO:
    """A DINO with noise added to its weights, so that every term of the loss matters; seeded by torch."""
    small: dict[str, Any] = {"out_dim": K, "head_hidden_dim": 16, "head_bottleneck_dim": 8, "freeze_last_layer": "0ep"}
    backbone = replace(BACKBONE, depth=depth)
    module = DINO(
        DINOConfig(**{**small, **method}),
        parts(backbone, optim=optim, batch_size=batch_size, compute=compute),
    )
    with torch.no_grad():
        for parameter in module.student.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    follow(module.teacher, module.student)
    return module


def batches(count: int, *, dtype: torch.dtype = torch.float64) -> Batches:
    """Batches of two global and two local crops of noise for 8 images, each image with another brightness."""
    return [
        [(torch.randn(8, 3, side, side) + torch.randn(8, 1, 1, 1)).to(dtype) for side in (32, 32, 16, 16)]
        for _ in range(count)
    ]


def split(batches: Batches, *, parts: int) -> Batches:
    """Split each batch into micro-batches."""
    return [[crop.chunk(parts)[i] for crop in crops] for crops in batches for i in range(parts)]


@dataclass
class Record(Callback):
    """Records losses, schedules, weights and centers after each micro-batch."""

    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """Optimizer steps taken so far."""
    rates: list[float] = field(default_factory=list)
    decays: list[tuple[float, ...]] = field(default_factory=list)
    """Weight decay of each parameter group."""
    students: list[dict[str, Tensor]] = field(default_factory=list)
    teachers: list[dict[str, Tensor]] = field(default_factory=list)
    centers: list[Tensor] = field(default_factory=list)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        (optimizer,) = trainer.optimizers
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)  # Lightning divides the loss
        self.steps.append(trainer.global_step)
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.decays.append(tuple(group["weight_decay"] for group in optimizer.param_groups))
        self.students.append(copy(pl_module.student))
        self.teachers.append(copy(pl_module.teacher))
        self.centers.append(pl_module.center.center.clone())


def copy(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def fit(module: DINO, data: Any, *, ckpt_path: str | None = None, **trainer: Any) -> Record:
    """Train on `data` (a list of batches, or a data module) in float64; `trainer` overrides options of the trainer."""
    record = Record()
    default: dict[str, Any] = {"precision": "64-true", "max_epochs": 1, "enable_checkpointing": False}
    options = {**default, **trainer, "callbacks": [record, *trainer.get("callbacks", [])]}
    options |= {"accelerator": "cpu", "devices": 1, "logger": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    if isinstance(data, list):
        data = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    L.Trainer(**options).fit(module, data, ckpt_path=ckpt_path)
    return record
