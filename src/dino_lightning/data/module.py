"""The LightningDataModule: multi-crop batches for training, plain images for evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino_lightning.config import CropsConfig, DataConfig
from dino_lightning.data.builtin import BuiltinImages
from dino_lightning.data.crops import MultiCrop, eval_transform
from dino_lightning.data.sources import ImageSource, Sources, open_sources
from dino_lightning.errors import UserError

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What PIL raises on broken files."""


class TransformedImages(Dataset[tuple[Any, int]]):
    """A source seen through a transform; an unreadable image is replaced by the next readable one, and named.

    The replacement does not depend on chance: index i falls back to i + 1, i + 2, … . Each unreadable image is
    appended to `bad_images` (one line, image and reason) by whichever process met it.
    """

    def __init__(self, source: ImageSource, transform: Callable[[Image.Image], Any], *, bad_images: Path | None):
        self.source, self.transform, self.bad_images = source, transform, bad_images

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        total = len(self.source)
        for shift in range(total):
            position = (index + shift) % total
            try:
                image, label = self.source[position]
            except UNREADABLE as error:
                self._note(position, error)
                continue
            return self.transform(image), label
        raise UserError("data: none of the images can be read; see bad_images.txt in output_dir.")

    def _note(self, position: int, error: Exception) -> None:
        if self.bad_images is not None:
            with self.bad_images.open("a") as file:
                file.write(f"{self.source.describe(position)}\t{type(error).__name__}: {error}\n")


class MultiCropDataModule(L.LightningDataModule):
    """Batches of V crops, each (B, 3, size, size); labels never reach training.

    For evaluation it offers `eval_dataset("train" | "val")` of (image (3, H, W), label).
    """

    def __init__(self, config: DataConfig, crops: CropsConfig, *, seed: int, bad_images: Path | None = None) -> None:
        super().__init__()
        self.config, self.crops, self.seed, self.bad_images = config, crops, seed, bad_images
        self._sources: Sources | None = None

    @property
    def sources(self) -> Sources:
        """Training and validation images, opened at first use."""
        if self._sources is None:
            self._sources = open_sources(self.config, seed=self.seed)
        return self._sources

    @property
    def labelled(self) -> bool:
        """Whether a k-NN evaluation is possible: labels on both sides."""
        train, val = self.sources.train, self.sources.val
        return train.labels is not None and val is not None and val.labels is not None

    @property
    def classes(self) -> list[str]:
        """Names of the classes; empty without labels."""
        return self.sources.train.classes or []

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def train_labels(self) -> np.ndarray:
        """Labels of the training images, int64 (n,); -1 marks an image without."""
        labels = self.sources.train.labels
        return np.full(len(self.sources.train), -1) if labels is None else labels

    def train_dataset(self) -> TransformedImages:
        """Training images as lists of V crops."""
        return TransformedImages(self.sources.train, MultiCrop(self.crops), bad_images=self.bad_images)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled multi-crop batches; an incomplete last batch is left out, as in the original."""
        workers = self.config.num_workers
        return DataLoader(
            self.train_dataset(),
            batch_size=self.config.batch_size_per_device,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.config.pin_memory and torch.cuda.is_available(),
            collate_fn=stack_crops,
        )

    def eval_dataset(self, split: str) -> TransformedImages:
        """The images of `train` or `val` as evaluation sees them, with labels."""
        source = self.sources.train if split == "train" else self.sources.val
        if source is None:
            raise UserError("data: there are no validation images; set data.holdout to a share of the images.")
        return TransformedImages(source, eval_transform(self.crops), bad_images=self.bad_images)

    def object_mask(self, index: int) -> np.ndarray | None:
        """The pixels of the object in validation image `index` (bool (H, W)), where the data has masks."""
        # A mask fits the picture only where evaluation shows the whole of it.
        whole = self.crops.eval_resize == self.crops.eval_size
        val = self.sources.val
        return val.mask(index) if whole and isinstance(val, BuiltinImages) else None


def stack_crops(samples: list[tuple[list[Tensor], int]]) -> list[Tensor]:
    """Samples of V crops -> V batches (B, 3, size, size)."""
    return [torch.stack(crops) for crops in zip(*(crops for crops, _ in samples), strict=True)]
