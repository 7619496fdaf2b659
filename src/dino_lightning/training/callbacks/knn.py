"""Weighted k-NN of the network while training, and of an untrained backbone and raw pixels before it.

The data module offers `labeled`, `num_classes`, `train_labels` and `eval_dataset(split)`; the module offers
`evaluated.backbone`. An evaluation leaves weights, buffers, random states and train / eval flags as they were.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import Dataset

from dino_lightning.config import KNNConfig
from dino_lightning.errors import UserError
from dino_lightning.evaluation.features.extract import extract_features, gather_by_index, subset_indices
from dino_lightning.evaluation.features.knn import knn_accuracy
from dino_lightning.runtime.sharding import gathered

PIXEL_SIDE = 32
"""Raw pixels are compared at this many pixels per side."""


QUESTIONS = 50
"""Times in an evaluation that it is asked whether to break it off."""


class _BrokenOffError(Exception):
    """An evaluation was broken off."""


class LabeledImages(Protocol):
    """What the callback asks of `trainer.datamodule`. A label of -1 means: none known."""

    config: Any
    labeled: bool
    num_classes: int
    train_labels: np.ndarray

    def eval_dataset(self, split: str) -> Dataset:
        """Images (3, H, W), normalized and without augmentation, with their labels."""
        ...


class KNNCallback(Callback):
    """Logs `knn/top1`, `knn/top5` (at the headline k) and `knn/top1_k10`, ... in percent.

    `last`, `untrained` and `pixels` hold the same names without `knn/`; they are empty where nothing was evaluated. A
    checkpoint carries all three. The bank stands in the memory of every rank: 4 N D bytes, D + 3072 with the baselines.
    """

    def __init__(self, config: KNNConfig, *, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self.untrained: dict[str, float] = {}
        self.pixels: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.last_step = -1
        self.on_images: Callable[[int, int], None] | None = None
        """Told how many images of how many this rank has seen, during an evaluation."""
        self.break_off: Callable[[], bool] | None = None
        """Asked now and then during an evaluation, on all ranks together, whether to break it off."""
        self.pending = False
        """Whether the latest evaluation was broken off. The run that goes on makes up for it when it starts."""
        self.made_up = False
        """Whether this run has done so."""

    def state_dict(self) -> dict[str, Any]:
        """Plain types only, so that `torch.load` reads the checkpoint with `weights_only=True`."""
        return {
            "untrained": dict(self.untrained),
            "pixels": dict(self.pixels),
            "last": dict(self.last),
            "last_step": self.last_step,
            "pending": self.pending,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the results of the run that is resumed."""
        self.untrained, self.pixels = dict(state_dict["untrained"]), dict(state_dict["pixels"])
        self.last, self.last_step = dict(state_dict["last"]), int(state_dict["last_step"])
        self.pending = bool(state_dict.get("pending", False))  # checkpoints of format 1 lack it

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The baselines, once per run: a resumed run has its weights trained already."""
        if self.config.enabled and not _images(trainer).labeled:
            rank_zero_warn("The training images have no labels: k-NN is not evaluated.")
        if not self._on(trainer):
            return
        if not len(cast(Any, _images(trainer).eval_dataset("val"))):
            raise UserError("callbacks.knn.enabled=true needs validation images, and there are none; set it to false.")
        if self.config.baselines and trainer.global_step == 0 and not self.untrained:
            self.untrained, self.pixels = self._evaluate(trainer, pl_module, with_pixels=True)
        if self.pending:
            self._evaluate_network(trainer, pl_module)
            self.pending, self.made_up = False, True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate and log. Lightning calls checkpoint callbacks after this one, wherever they stand."""
        epochs = trainer.current_epoch + 1
        ends = trainer.should_stop or epochs == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if not self._on(trainer) or not (ends or epochs % self.config.every_n_epochs == 0):
            return
        self._evaluate_network(trainer, pl_module, may_break_off=not ends)
        if self.pending:
            return
        for name, value in self.last.items():
            # Every rank has the value of all. "max" keeps it to the last bit, and unlike `sync_dist=False` does not
            # make Lightning warn about it.
            pl_module.log(f"knn/{name}", value, prog_bar=name == "top1", reduce_fx="max", sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate what no end of an epoch has: another callback stopped the run after this one had its turn."""
        if not self._on(trainer) or self.last_step == trainer.global_step:
            return
        self._evaluate_network(trainer, pl_module)
        for logger in trainer.loggers:
            # Lightning, too, counts the row of an epoch's end as the last step taken.
            logger.log_metrics({f"knn/{name}": value for name, value in self.last.items()}, trainer.global_step - 1)

    def _on(self, trainer: Trainer) -> bool:
        return self.config.enabled and _images(trainer).labeled

    def _evaluate_network(self, trainer: Trainer, pl_module: LightningModule, *, may_break_off: bool = False) -> None:
        try:
            (self.last,) = self._evaluate(trainer, pl_module, may_break_off=may_break_off)
        except _BrokenOffError:
            self.pending = True
            return
        self.last_step = trainer.global_step

    def _evaluate(
        self, trainer: Trainer, pl_module: LightningModule, *, with_pixels: bool = False, may_break_off: bool = False
    ) -> list[dict[str, float]]:
        """The result of the trained backbone and, from the same pass over the images, that of raw pixels."""
        images = _images(trainer)
        train, val = images.eval_dataset("train"), images.eval_dataset("val")
        asked = subset_indices(len(cast(Any, val)), limit=self.config.queries, seed=self.seed)
        backbone = cast(nn.Module, cast(Any, pl_module).evaluated.backbone)
        forward = _forward(backbone, trainer, with_pixels=with_pixels)
        chosen = self._bank(images)
        options: dict[str, Any] = {
            "on_batch": self._counter((len(chosen) + len(asked)) // trainer.world_size, may_break_off=may_break_off),
            "batch_size": self.config.batch_size_per_device,
            "num_workers": images.config.num_workers,
            "device": pl_module.device,
        }
        with evaluating(backbone):
            bank = extract_features(forward, train, indices=chosen, **options)
            queries = extract_features(forward, val, indices=asked, **options)
        bank_ND, bank_labels_N, _ = gather_by_index(*_labeled(*bank))
        queries_MD, query_labels_M, _ = _labeled(*queries)
        D = bank_ND.shape[1]
        pixels = PIXEL_SIDE**2 * train[0][0].shape[0] if with_pixels else 0
        widths = [D - pixels, pixels] if with_pixels else [D]
        return [
            self._named(
                knn_accuracy(
                    bank_part,
                    bank_labels_N,
                    query_part,
                    query_labels_M,
                    k=self.config.k,
                    temperature=self.config.temperature,
                    num_classes=images.num_classes,
                    # Not on other accelerators: `nearest` needs 64-bit keys in `topk`.
                    device=pl_module.device if pl_module.device.type == "cuda" else torch.device("cpu"),
                )
            )
            for bank_part, query_part in zip(bank_ND.split(widths, 1), queries_MD.split(widths, 1), strict=True)
        ]

    def _counter(self, total: int, *, may_break_off: bool) -> Callable[[int], None]:
        done, asked = 0, 0
        ask = self.break_off if may_break_off else None
        every = max(self.config.batch_size_per_device, total // QUESTIONS)

        def count(images: int) -> None:
            nonlocal done, asked
            done += images
            if self.on_images is not None:
                self.on_images(done, total)
            # Ranks have the same number of images give or take one for each set: none asks near the end.
            while ask is not None and (asked + 1) * every <= min(done, total - 2):
                asked += 1
                if ask():
                    raise _BrokenOffError

        return count

    def _bank(self, images: LabeledImages) -> list[int]:
        known = np.flatnonzero(images.train_labels >= 0)
        return [int(known[i]) for i in subset_indices(len(known), limit=self.config.bank, seed=self.seed)]

    def _named(self, accuracy: dict[int, dict[str, float]]) -> dict[str, float]:
        by_k = {f"{name}_k{k}": value for k, both in accuracy.items() for name, value in both.items()}
        return accuracy[self.config.headline_k] | by_k


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode within; after it each submodule has its own flag back, frozen ones in eval mode theirs.

    Sharded weights are gathered once for the whole evaluation: ranks may have different numbers of batches.
    """
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with gathered(module):
            yield
    finally:
        for part, training in flags:
            part.training = training


def _forward(backbone: nn.Module, trainer: Trainer, *, with_pixels: bool) -> Callable[[Tensor], Tensor]:
    """Images (B, 3, H, W) -> features (B, D) in the run's precision, with their pixels behind them if asked."""
    precision = trainer.precision_plugin

    def forward(images_B3HW: Tensor) -> Tensor:
        with precision.forward_context():
            features_BD = backbone(precision.convert_input(images_B3HW)).float()
        if not with_pixels:
            return features_BD
        small_B3hw = F.interpolate(images_B3HW, size=(PIXEL_SIDE, PIXEL_SIDE), mode="bilinear", antialias=True)
        return torch.cat([features_BD, small_B3hw.flatten(1)], dim=1)

    return forward


def _labeled(features_ND: Tensor, labels_N: Tensor, indices_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    known_N = labels_N >= 0
    if known_N.all():  # almost always, and it saves a copy of the bank
        return features_ND, labels_N, indices_N
    return features_ND[known_N], labels_N[known_N], indices_N[known_N]


def _images(trainer: Trainer) -> LabeledImages:
    return cast(LabeledImages, cast(Any, trainer).datamodule)
