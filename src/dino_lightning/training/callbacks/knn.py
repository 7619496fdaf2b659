"""Weighted k-NN accuracy of the network during training, and of an untrained backbone and raw pixels as baselines.

An evaluation changes neither weights, buffers, random states nor train / eval modes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from dino_lightning.config import KNNConfig
from dino_lightning.data.module import MultiCropDataModule
from dino_lightning.errors import UserError
from dino_lightning.evaluation.features.extract import extract_features, gather_by_index, labeled_subset, subset_indices
from dino_lightning.evaluation.features.knn import knn_accuracy
from dino_lightning.runtime.sharding import gathered

PIXEL_SIDE = 32
"""Raw pixels are compared at this side length."""
SAVED = ("untrained", "pixels", "last", "last_step", "interrupted")
"""Attributes of the callback in a checkpoint."""
INTERRUPT_CHECKS = 50
"""How often per evaluation the callback checks whether to interrupt it."""


class EvaluationInterrupted(Exception):  # noqa: N818
    """The run was asked to stop during an evaluation."""


class KNNCallback(Callback):
    """Logs `knn/top1`, `knn/top5` (at the headline k) and `knn/top1_k10`, ... in percent.

    `last`, `untrained` and `pixels` have the same names without `knn/`; they are empty until evaluated, and are saved
    in checkpoints. Every rank keeps the features of the bank in memory: 4 N D bytes, with D + 3072 for the baselines.
    """

    def __init__(self, config: KNNConfig, *, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        self.untrained: dict[str, float] = {}
        self.pixels: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.last_step = -1
        self.on_progress: Callable[[int, int], None] | None = None
        """Called during an evaluation with this rank's finished images and their total."""
        self.should_interrupt: Callable[[], bool] | None = None
        """Called repeatedly during an evaluation, on all ranks together."""
        self.interrupted = False
        """Whether the latest evaluation was interrupted. A resumed run repeats it at its start."""
        self.completed_on_resume = False
        """Whether this run has repeated it."""

    def state_dict(self) -> dict[str, Any]:
        """Plain types only, so that `torch.load` reads the checkpoint with `weights_only=True`."""
        return {name: getattr(self, name) for name in SAVED}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the results."""
        for name in SAVED:
            setattr(self, name, state_dict[name])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the baselines of a new run, or repeat the interrupted evaluation of a resumed one."""
        if self.config.enabled and not data_module(trainer).labeled:
            rank_zero_warn("The training images have no labels: k-NN is not evaluated.")
        if not self._on(trainer):
            return
        if not len(data_module(trainer).eval_dataset("val")):
            raise UserError("callbacks.knn.enabled=true needs validation images, and there are none; set it to false.")
        if self.config.baselines and trainer.global_step == 0 and not self.untrained:
            self.untrained, self.pixels = self._evaluate(trainer, pl_module, with_pixels=True)
        if self.interrupted:
            self._evaluate_network(trainer, pl_module)
            self.interrupted, self.completed_on_resume = False, True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate and log. Lightning calls checkpoint callbacks after this one, whatever their position."""
        epochs = trainer.current_epoch + 1
        ends = trainer.should_stop or epochs == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if not self._on(trainer) or not (ends or epochs % self.config.every_n_epochs == 0):
            return
        self._evaluate_network(trainer, pl_module, interruptible=not ends)
        if self.interrupted:
            return
        for name, value in self.last.items():
            # All ranks have the same value: "max" keeps it exactly, and Lightning warns without `sync_dist`.
            pl_module.log(f"knn/{name}", value, prog_bar=name == "top1", reduce_fx="max", sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate if the last epoch's end did not, because another callback stopped the run after this one ran."""
        if not self._on(trainer) or self.last_step == trainer.global_step:
            return
        self._evaluate_network(trainer, pl_module)
        for logger in trainer.loggers:
            # Lightning also logs an epoch's end at the last step taken.
            logger.log_metrics({f"knn/{name}": value for name, value in self.last.items()}, trainer.global_step - 1)

    def _on(self, trainer: Trainer) -> bool:
        return self.config.enabled and data_module(trainer).labeled

    def _evaluate_network(self, trainer: Trainer, pl_module: LightningModule, *, interruptible: bool = False) -> None:
        try:
            (self.last,) = self._evaluate(trainer, pl_module, interruptible=interruptible)
        except EvaluationInterrupted:
            self.interrupted = True
            return
        self.last_step = trainer.global_step

    def _evaluate(
        self, trainer: Trainer, pl_module: LightningModule, *, with_pixels: bool = False, interruptible: bool = False
    ) -> list[dict[str, float]]:
        """The accuracies of the backbone and, from the same pass over the images, those of raw pixels."""
        images = data_module(trainer)
        train, val = images.eval_dataset("train"), images.eval_dataset("val")
        bank_indices = labeled_subset(images.train_labels, limit=self.config.bank, seed=self.seed)
        query_indices = subset_indices(len(val), limit=self.config.queries, seed=self.seed)
        backbone: nn.Module = cast(Any, pl_module).evaluated.backbone
        forward = _forward(backbone, trainer, with_pixels=with_pixels)
        total = (len(bank_indices) + len(query_indices)) // trainer.world_size
        interval = max(self.config.batch_size_per_device, total // INTERRUPT_CHECKS)
        should_interrupt = self.should_interrupt if interruptible else None
        options: dict[str, Any] = {
            "on_batch": EvaluationProgress(total, interval, self.on_progress, should_interrupt),
            "batch_size": self.config.batch_size_per_device,
            "num_workers": images.config.num_workers,
            "device": pl_module.device,
        }
        with evaluating(backbone):
            bank = extract_features(forward, train, indices=bank_indices, **options)
            queries = extract_features(forward, val, indices=query_indices, **options)
        bank_ND, bank_labels_N, _ = gather_by_index(*_labeled(*bank))
        queries_MD, query_labels_M, _ = _labeled(*queries)
        D = bank_ND.shape[1]
        pixels = PIXEL_SIDE**2 * train[0][0].shape[0] if with_pixels else 0
        widths = [D - pixels, pixels] if with_pixels else [D]
        accuracies = []
        for bank_part, query_part in zip(bank_ND.split(widths, 1), queries_MD.split(widths, 1), strict=True):
            by_k = knn_accuracy(
                bank_part,
                bank_labels_N,
                query_part,
                query_labels_M,
                k=self.config.k,
                temperature=self.config.temperature,
                num_classes=images.num_classes,
                # Not on other accelerators: `nearest_neighbors` needs 64-bit keys in `topk`.
                device=pl_module.device if pl_module.device.type == "cuda" else torch.device("cpu"),
            )
            named = {f"{name}_k{k}": value for k, both in by_k.items() for name, value in both.items()}
            accuracies.append(by_k[self.config.headline_k] | named)
        return accuracies


@dataclass
class EvaluationProgress:
    """Counts the images of an evaluation on this rank, reports them, and interrupts the evaluation on request."""

    total: int
    interval: int
    """Images between two checks."""
    report: Callable[[int, int], None] | None
    should_interrupt: Callable[[], bool] | None
    done: int = 0
    checks: int = 0

    def __call__(self, images: int) -> None:
        """Add finished images; raises `EvaluationInterrupted` if requested."""
        self.done += images
        if self.report is not None:
            self.report(self.done, self.total)
        # Ranks differ by at most one image per dataset, so all of them make the same checks if none is near the end.
        while self.should_interrupt is not None and (self.checks + 1) * self.interval <= min(self.done, self.total - 2):
            self.checks += 1
            if self.should_interrupt():
                raise EvaluationInterrupted


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode within; afterwards each submodule has its previous mode, as frozen ones may have been in eval mode.

    Sharded weights are gathered once for the whole evaluation: ranks may have different numbers of batches.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with gathered(module):
            yield
    finally:
        for part, training in modes:
            part.training = training


def _forward(backbone: nn.Module, trainer: Trainer, *, with_pixels: bool) -> Callable[[Tensor], Tensor]:
    """Images (B, C, H, W) -> features (B, D) in the run's precision, followed by their pixels with `with_pixels`."""
    precision = trainer.precision_plugin

    def forward(images_BCHW: Tensor) -> Tensor:
        with precision.forward_context():
            features_BD = backbone(precision.convert_input(images_BCHW)).float()
        if not with_pixels:
            return features_BD
        small_BChw = F.interpolate(images_BCHW, size=(PIXEL_SIDE, PIXEL_SIDE), mode="bilinear", antialias=True)
        return torch.cat([features_BD, small_BChw.flatten(1)], dim=1)

    return forward


def _labeled(features_ND: Tensor, labels_N: Tensor, indices_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    known_N = labels_N >= 0
    if known_N.all():  # the usual case, without a copy of the bank
        return features_ND, labels_N, indices_N
    return features_ND[known_N], labels_N[known_N], indices_N[known_N]


def data_module(trainer: Trainer) -> MultiCropDataModule:
    """The data module of this training."""
    return cast(Any, trainer).datamodule
