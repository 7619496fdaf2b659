"""Pictures of what the network sees: crops at the start; attention, patch tokens and neighbors while training."""

from collections.abc import Callable
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
from dino_lightning.evaluation.features.extract import extract_features, gather_by_index, subset_indices
from dino_lightning.evaluation.features.knn import nearest_neighbors
from dino_lightning.models.tokens import cls_attention, has_attention, patch_tokens
from dino_lightning.report.pictures.sheets import attention_sheet, crop_sheet, neighbor_sheet, to_picture
from dino_lightning.report.pictures.tokens import patch_sheet
from dino_lightning.runtime.console import warn
from dino_lightning.runtime.files import atomic_file
from dino_lightning.training.callbacks.knn import evaluating

BANK = 2000
"""Most images among which neighbors are looked for: enough for a picture."""
NEIGHBORS = 6


class Pictures(L.Callback):
    """Writes `pictures/{crops,attention,pca,neighbors}.png`, and numbered ones every N epochs."""

    def __init__(self, config: PicturesConfig, *, folder: Path, seed: int) -> None:
        self.config, self.folder, self.seed = config, folder, seed

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show what the augmentation does."""
        if not trainer.is_global_zero or trainer.global_step:
            return
        data = _data(trainer)
        labels = data.train_labels
        samples = data.example_crops(self._chosen(labels, len(labels))[:4])
        crops = [crop for sample in samples for crop in sample]
        sheet = crop_sheet(crops, data.crops.mean, data.crops.std, per_row=len(samples[0]))
        self._save(trainer, sheet, "crops", epoch=None)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Numbered pictures, while training."""
        epoch = trainer.current_epoch + 1
        if epoch % self.config.every_n_epochs == 0 and epoch != trainer.max_epochs:
            self._draw(trainer, pl_module, epoch=epoch)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The pictures of the run."""
        self._draw(trainer, pl_module, epoch=None)

    def _draw(self, trainer: L.Trainer, pl_module: Any, *, epoch: int | None) -> None:
        data, backbone = _data(trainer), pl_module.evaluated.backbone
        shown = data.eval_dataset("val" if data.sources.val is not None else "train")
        chosen = self._chosen(shown.source.labels, len(shown))
        images = torch.stack([shown[index][0] for index in chosen]).to(pl_module.device)
        with evaluating(backbone):
            if trainer.is_global_zero and has_attention(backbone):
                self._tokens(trainer, data, backbone, images, chosen, epoch=epoch)
            sheet = self._neighbors(data, backbone, images, shown, chosen, device=pl_module.device)
            if trainer.is_global_zero:
                self._save(trainer, sheet, "neighbors", epoch=epoch)

    def _tokens(
        self,
        trainer: L.Trainer,
        data: MultiCropDataModule,
        backbone: Any,
        images_B3HW: Tensor,
        chosen: list[int],
        *,
        epoch: int | None,
    ) -> None:
        """What the class token attends to, and what the patches' own tokens tell apart."""
        plain = denormalize(images_B3HW, config=data.crops).cpu()
        masks = [data.object_mask(index) for index in chosen]
        outlines = None if any(mask is None for mask in masks) else [mask for mask in masks if mask is not None]
        attention = attention_sheet(plain, cls_attention(backbone, images_B3HW).cpu(), outlines)
        self._save(trainer, attention, "attention", epoch=epoch)
        self._save(trainer, patch_sheet(plain, patch_tokens(backbone, images_B3HW).cpu()), "pca", epoch=epoch)

    def _neighbors(
        self,
        data: MultiCropDataModule,
        backbone: Callable[[Tensor], Tensor],
        images_B3HW: Tensor,
        shown: EvalImages,
        chosen: list[int],
        *,
        device: torch.device,
    ) -> Image.Image:
        """All ranks call this: the bank's features are computed together."""
        bank = data.eval_dataset("train")
        own = data.sources.val is None  # the queries stand in the bank, too, each as its own nearest neighbor
        drawn = subset_indices(len(bank), limit=BANK, seed=self.seed)
        indices = sorted(set(drawn + chosen)) if own else drawn
        shard = extract_features(
            backbone, bank, batch_size=256, num_workers=data.config.num_workers, device=device, indices=indices
        )
        features, labels, positions = gather_by_index(*shard)
        with torch.no_grad():
            queries = backbone(images_B3HW).float().cpu()
        _, found = nearest_neighbors(features, queries, k=NEIGHBORS + own, device=torch.device("cpu"))
        found = found[:, int(own) :]

        def named(label: int) -> str:
            return data.classes[label] if label >= 0 else "?"

        return neighbor_sheet(
            [self._plain(data, image) for image in images_B3HW.cpu()],
            [[self._plain(data, bank[int(positions[i])][0]) for i in row] for row in found],
            query_labels=[named(shown[index][1]) for index in chosen] if data.labeled else None,
            neighbor_labels=[[named(int(labels[i])) for i in row] for row in found] if data.labeled else None,
        )

    def _chosen(self, labels: np.ndarray | None, n: int) -> list[int]:
        """Images drawn by seed, one of each class before a second of any; the same all through a run."""
        order = np.random.default_rng(self.seed).permutation(n)
        if labels is not None:
            turn, seen = np.empty(n, dtype=np.int64), dict.fromkeys(labels.tolist(), 0)
            for position, index in enumerate(order):
                turn[position] = seen[int(labels[index])]
                seen[int(labels[index])] += 1
            order = order[np.argsort(turn, kind="stable")]
        return order[: self.config.images].tolist()

    def _plain(self, data: MultiCropDataModule, image_3HW: Tensor) -> Image.Image:
        return to_picture(denormalize(image_3HW, config=data.crops))

    def _save(self, trainer: L.Trainer, sheet: Image.Image, name: str, *, epoch: int | None) -> None:
        path = self.folder / (f"{name}.png" if epoch is None else f"{name}_epoch{epoch:04d}.png")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                sheet.save(file, format="PNG")
        except OSError as error:
            warn(f"{path} could not be written ({error.strerror or error}); training goes on without it.")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                # As of the last step taken, as the row of an epoch's end; without a step, as of the last row.
                steps = trainer.global_step
                caption = [f"after {steps} steps"]
                logger.log_image(key=f"pictures/{name}", images=[sheet], step=max(0, steps - 1), caption=caption)


def _data(trainer: L.Trainer) -> MultiCropDataModule:
    return trainer.datamodule  # type: ignore[attr-defined]
