"""A tiny training with noise images and a small network, for the tests of the k-NN callback."""

import random
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dino_lightning.config import KNNConfig

CLASSES = 4


class Stripes(Dataset):
    """48 x 48 noise whose class is the brightest quarter of the columns. Labels after the first `known` are -1."""

    def __init__(self, n: int, *, seed: int, known: int | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, CLASSES, (n,), generator=generator)
        self.images = 2.0 * torch.randn(n, 3, 48, 48, generator=generator)
        for image, label in zip(self.images, self.labels, strict=True):
            image[:, :, 12 * int(label) : 12 * int(label) + 12] += 0.3
        self.labels[known:] = -1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i], int(self.labels[i])


class Data(LightningDataModule):
    def __init__(self, *, labeled: bool = True, n_val: int = 21) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_workers=0)
        self.labeled, self.num_classes = labeled, CLASSES
        self.sets = {"train": Stripes(64, seed=1, known=60), "val": Stripes(n_val, seed=2, known=20)}
        self.train_labels = self.sets["train"].labels.numpy()

    def eval_dataset(self, split: str) -> Stripes:
        return self.sets[split]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.sets["train"], batch_size=16, shuffle=True)


class Backbone(nn.Sequential):
    def __init__(self) -> None:
        frozen = nn.BatchNorm2d(8).eval()
        super().__init__(
            nn.Conv2d(3, 8, 12, 12),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.1),
            frozen,
            nn.Flatten(),
            nn.Linear(128, 6),
        )


class Method(LightningModule):
    """Trains `teacher.backbone` as a classifier; the result does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Module()
        self.teacher.backbone = Backbone()
        self.losses: list[float] = []

    @property
    def evaluated(self) -> nn.Module:
        return self.teacher

    def on_train_start(self) -> None:
        self.teacher.backbone[4].eval()

    def training_step(self, batch: list[Tensor]) -> Tensor:
        # Uses all three random states, so that the loss changes if the callback changes one of them.
        noise = 0.01 * (torch.rand(()) + random.random() + np.random.rand())
        loss = F.cross_entropy(self.teacher.backbone(batch[0] + noise), batch[1], ignore_index=-1)
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def knn_config(**changes: Any) -> KNNConfig:
    return KNNConfig(**{"k": [3, 10], "headline_k": 3, "batch_size_per_device": 16, **changes})


def fit(
    folder: Path,
    callbacks: list[Callback],
    *,
    data: Data | None = None,
    resume: Path | None = None,
    ignore_warnings: bool = True,
    **settings: Any,
) -> tuple[Trainer, Method]:
    seed_everything(0, verbose=False)
    method = Method()
    options = {"max_epochs": 2, "accelerator": "cpu", "enable_checkpointing": False, **settings}
    trainer = Trainer(
        callbacks=callbacks,
        logger=CSVLogger(folder, version=0),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    with warnings.catch_warnings():
        if ignore_warnings:
            warnings.simplefilter("ignore")  # of Lightning, about few workers and modules in eval mode
        trainer.fit(method, datamodule=data or Data(), ckpt_path=resume)
    return trainer, method
