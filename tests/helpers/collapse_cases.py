"""Small methods and distinguishable images, for the tests of the collapse alarm."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from dino_lightning.config import AdamWConfig, BYOLConfig, DINOConfig
from dino_lightning.methods.base import Method
from dino_lightning.methods.byol import BYOL
from dino_lightning.methods.dino import DINO
from dino_lightning.methods.feature_buffer import FeatureBuffer
from dino_lightning.methods.parts import MethodParts

BATCH, SIZE, WIDTH = 16, 32, tiny.BACKBONE.width


def images(count: int, *, seed: int = 0) -> list[list[Tensor]]:
    """Batches of two views: every image is a different pattern of coarse colors with noise."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        coarse = torch.randn(BATCH, 3, 2, 2, generator=generator)
        pattern = 2 * F.interpolate(coarse, size=(SIZE, SIZE), mode="nearest")
        batches.append([pattern + 0.3 * torch.randn(pattern.shape, generator=generator) for _ in range(2)])
    return batches


def parts() -> MethodParts:
    return tiny.parts(optim=AdamWConfig(lr=0.016, lr_warmup="10it"), batch_size=BATCH)


def dino(**method: Any) -> DINO:
    small: dict[str, Any] = {
        "out_dim": 32,
        "head_hidden_dim": 32,
        "head_bottleneck_dim": 16,
        "freeze_last_layer": "0ep",
    }
    torch.manual_seed(0)
    return DINO(DINOConfig(**{**small, "teacher_momentum": 0.98, **method}), parts())


def byol(**method: Any) -> BYOL:
    small: dict[str, Any] = {"out_dim": 16, "head_hidden_dim": 32, "teacher_momentum": 0.98}
    torch.manual_seed(0)
    return BYOL(BYOLConfig(**{**small, **method}), parts())


def fit(
    method: Method,
    *callbacks: Callback,
    data: list[list[Tensor]] | None = None,
    folder: Path | None = None,
    steps: int = 128,
    resume: Path | None = None,
    **options: Any,
) -> L.Trainer:
    """Train with 16 steps per epoch and log every step."""
    logger = CSVLogger(folder, name="", version="") if folder else False
    options = {"devices": 1, "max_epochs": steps // 16, "enable_checkpointing": False, **options}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    trainer = L.Trainer(accelerator="cpu", logger=logger, callbacks=list(callbacks), **options)
    loader = DataLoader(data or images(16), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(method, loader, ckpt_path=resume, weights_only=True if resume else None)
    return trainer


class RecordedMetrics(SimpleNamespace):
    """A fake of the parts of a method that collapse signals need; records the metrics."""

    def __init__(self, rows: int = 3) -> None:
        super().__init__(recorded={}, feature_buffer=FeatureBuffer(), compute=SimpleNamespace(loss_rows=rows))

    def log_metric(self, name: str, value: Tensor) -> None:
        self.recorded[name.removeprefix("collapse/")] = value
