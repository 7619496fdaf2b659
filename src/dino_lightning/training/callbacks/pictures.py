"""Pictures of the training: crops at the start; attention maps, patch tokens and nearest neighbors later."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor

from dino_lightning.config import PicturesConfig
from dino_lightning.data.crops import denormalize
from dino_lightning.data.module import EvalImages, MultiCropDataModule
from dino_lightning.evaluation.features.extract import (
    extract_features,
    gather_by_index,
    spread_over_classes,
    subset_indices,
)
from dino_lightning.evaluation.features.knn import nearest_neighbors
from dino_lightning.models.tokens import cls_attention, has_attention, patch_tokens
from dino_lightning.report.pictures.sheets import attention_sheet, crop_sheet, neighbor_sheet, to_picture
from dino_lightning.report.pictures.tokens import patch_sheet
from dino_lightning.runtime.console import warn
from dino_lightning.runtime.files import atomic_file
from dino_lightning.training.callbacks.knn import data_module, evaluating

BANK_IMAGES = 2000
"""Neighbors are searched among at most this many images, enough for a picture."""
NEIGHBORS = 6


class PictureSheets(L.Callback):
    """Writes `pictures/{crops,attention,pca,neighbors}.png`, and numbered ones every N epochs."""

    def __init__(self, config: PicturesConfig, *, folder: Path, seed: int) -> None:
        self.config, self.folder, self.seed = config, folder, seed

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw crops, to show the augmentation."""
        if not trainer.is_global_zero or trainer.global_step:
            return
        data = data_module(trainer)
        labels = data.train_labels
        samples = data.example_crops(self._example_indices(labels, len(labels))[:4])
        crops = [crop for sample in samples for crop in sample]
        sheet = crop_sheet(crops, data.crops.mean, data.crops.std, per_row=len(samples[0]))
        self._save(trainer, sheet, "crops", epoch=None)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the numbered pictures of this epoch."""
        epoch = trainer.current_epoch + 1
        if epoch % self.config.every_n_epochs == 0 and epoch != trainer.max_epochs:
            self._draw(trainer, pl_module, epoch=epoch)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the final pictures."""
        self._draw(trainer, pl_module, epoch=None)

    def _draw(self, trainer: L.Trainer, pl_module: Any, *, epoch: int | None) -> None:
        data, backbone = data_module(trainer), pl_module.evaluated.backbone
        dataset = data.eval_dataset("val" if data.sources.val is not None else "train")
        indices = self._example_indices(dataset.source.labels, len(dataset))
        images = torch.stack([dataset[index][0] for index in indices]).to(pl_module.device)
        with evaluating(backbone):
            if trainer.is_global_zero and has_attention(backbone):
                self._draw_tokens(trainer, backbone, images, indices, epoch=epoch)
            sheet = self._neighbor_sheet(data, backbone, images, dataset, indices)
            if trainer.is_global_zero:
                self._save(trainer, sheet, "neighbors", epoch=epoch)

    def _draw_tokens(
        self, trainer: L.Trainer, backbone: Any, images_B3HW: Tensor, indices: list[int], *, epoch: int | None
    ) -> None:
        """Draw the class token's attention, and the principal components of the patch tokens."""
        data = data_module(trainer)
        pixels = denormalize(images_B3HW, config=data.crops).cpu()
        masks = [data.object_mask(index) for index in indices]
        outlines = None if any(mask is None for mask in masks) else [mask for mask in masks if mask is not None]
        attention = attention_sheet(pixels, cls_attention(backbone, images_B3HW).cpu(), outlines)
        self._save(trainer, attention, "attention", epoch=epoch)
        self._save(trainer, patch_sheet(pixels, patch_tokens(backbone, images_B3HW).cpu()), "pca", epoch=epoch)

    def _neighbor_sheet(
        self, data: MultiCropDataModule, backbone: Any, images_B3HW: Tensor, dataset: EvalImages, indices: list[int]
    ) -> Image.Image:
        """The nearest neighbors of some images; all ranks call this, as they extract the bank's features together."""
        bank = data.eval_dataset("train")
        in_bank = data.sources.val is None  # the queries are in the bank, each the nearest neighbor of itself
        bank_indices = subset_indices(len(bank), limit=BANK_IMAGES, seed=self.seed)
        if in_bank:
            bank_indices = sorted(set(bank_indices + indices))
        options: dict[str, Any] = {"num_workers": data.config.num_workers, "device": images_B3HW.device}
        shard = extract_features(backbone, bank, batch_size=256, indices=bank_indices, **options)
        features, labels, positions = gather_by_index(*shard)
        with torch.no_grad():
            queries = backbone(images_B3HW).float().cpu()
        _, neighbors = nearest_neighbors(features, queries, k=NEIGHBORS + in_bank, device=torch.device("cpu"))
        neighbors = neighbors[:, int(in_bank) :]

        def class_name(label: int) -> str:
            return data.classes[label] if label >= 0 else "?"

        def picture(image_3HW: Tensor) -> Image.Image:
            return to_picture(denormalize(image_3HW, config=data.crops))

        return neighbor_sheet(
            [picture(image) for image in images_B3HW.cpu()],
            [[picture(bank[int(positions[i])][0]) for i in row] for row in neighbors],
            query_labels=[class_name(dataset[index][1]) for index in indices] if data.labeled else None,
            neighbor_labels=[[class_name(int(labels[i])) for i in row] for row in neighbors] if data.labeled else None,
        )

    def _example_indices(self, labels: np.ndarray | None, n: int) -> list[int]:
        """Images drawn by seed, one of each class before a second of any; the same during the whole run."""
        return spread_over_classes(labels, n, seed=self.seed)[: self.config.images].tolist()

    def _save(self, trainer: L.Trainer, sheet: Image.Image, name: str, *, epoch: int | None) -> None:
        path = self.folder / (f"{name}.png" if epoch is None else f"{name}_epoch{epoch:04d}.png")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                sheet.save(file, format="PNG")
        except OSError as error:
            warn(f"{path} could not be written ({error.strerror or error}); training continues without it.")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                steps = trainer.global_step
                step = max(0, steps - 1)  # the last step taken, like the row of an epoch's end
                logger.log_image(f"pictures/{name}", [sheet], step=step, caption=[f"after {steps} steps"])
