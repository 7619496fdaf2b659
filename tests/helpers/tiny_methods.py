"""The other methods, small enough to train in a test."""

from dataclasses import dataclass, field, replace
from typing import Any

import lightning as L
import tiny
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from dino_lightning.config import (
    MOCO_3,
    BYOLConfig,
    ComputeConfig,
    MoCoConfig,
    OptimConfig,
    SupervisedConfig,
    SwAVConfig,
    TeacherConfig,
)
from dino_lightning.data.batch import LabeledCrops
from dino_lightning.methods.base import Method
from dino_lightning.methods.registry import create_method
from dino_lightning.methods.student_teacher import StudentTeacher
from dino_lightning.optim.ema import follow

CLASSES = 3
SMALL: dict[str, Any] = {"out_dim": 8, "head_hidden_dim": 16}
CONFIGS: dict[str, Any] = {
    "byol": BYOLConfig(**SMALL, teacher_momentum=0.9),
    "moco2": MoCoConfig(**{**SMALL, "queue_length": 12, "teacher_momentum": 0.9}),
    "moco3": MoCoConfig(**{**MOCO_3, **SMALL, "version": 3, "teacher_momentum": 0.9}),
    "swav": SwAVConfig(**SMALL, head_bottleneck_dim=6, queue_start="0it", freeze_prototypes="0it"),
    "supervised": SupervisedConfig(),
}


def build(
    name: str,
    *,
    optim: OptimConfig | None = None,
    batch_size: int = 8,
    compute: ComputeConfig | None = None,
    **changed: Any,
) -> Any:
    """A method with noise added to its weights, so that every term of the loss matters; seeded by torch."""
    config = replace(CONFIGS[name], **changed)
    parts = tiny.parts(
        teacher=isinstance(config, TeacherConfig),
        optim=optim,
        batch_size=batch_size,
        compute=compute,
        num_classes=CLASSES if config.uses_labels else 0,
    )
    module = create_method(config, parts)
    with torch.no_grad():
        for parameter in module.student.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if isinstance(module, StudentTeacher):
        follow(module.teacher, module.student)
    return module


def labeled(batches: tiny.Batches) -> list[LabeledCrops]:
    """The batches with labels that can be learned: whether an image is bright."""
    return [LabeledCrops(crops, (crops[0].mean(dim=(1, 2, 3)) > 0).long()) for crops in batches]


def real(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without running statistics of batch norms, which are not used in training."""
    return {name: tensor for name, tensor in state.items() if "running" not in name and "num_batches" not in name}


@dataclass
class States(Callback):
    """Records losses and the state of the module after each micro-batch."""

    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)  # Lightning divides the loss
        self.steps.append(trainer.global_step)
        self.states.append(real(tiny.copy(pl_module)))


def fit(module: Method, data: Any, *, ckpt_path: Any = None, **trainer: Any) -> States:
    """Train on `data` (a list of batches, or a data module) in float64; `trainer` overrides options of the trainer."""
    states = States()
    if ckpt_path is not None:
        module.double()  # Lightning loads the weights before it converts the module
    default: dict[str, Any] = {"precision": "64-true", "max_epochs": 1, "enable_checkpointing": False}
    options = {**default, **trainer, "callbacks": [states, *trainer.get("callbacks", [])]}
    options |= {"accelerator": "cpu", "devices": 1, "logger": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    if isinstance(data, list):
        data = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    L.Trainer(**options).fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return states
