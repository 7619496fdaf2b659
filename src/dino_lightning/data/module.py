"""The LightningDataModule: multi-crop batches for training, single views for evaluation."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from dino_lightning.config import CropsConfig, DataConfig
from dino_lightning.data.bad_images import UNREADABLE, BadImages, ReadableImages, why_unreadable
from dino_lightning.data.batch import LabeledCrops
from dino_lightning.data.batches import MultiCropDataset, MultiCropStream, crop_seed
from dino_lightning.data.cache import cached
from dino_lightning.data.crops import CropBackend, EvalView, RawCrops, crop_backend
from dino_lightning.data.decode import Decoder
from dino_lightning.data.loader import EpochBatchSampler, MapLoader, ResumableLoader, StreamLoader, loader_options
from dino_lightning.data.sources import ImageSource, ImageStream, Splits, open_sources
from dino_lightning.data.sources.base import Content, FirstImages, evenly_spaced
from dino_lightning.data.sources.builtin import BuiltinImages
from dino_lightning.errors import UserError
from dino_lightning.runtime.collectives import rank, world_size

STREAM_PREVIEW_IMAGES = 256
"""First images of a stream, which checks and pictures use."""


class EvalImages(Dataset[tuple[Tensor, int]]):
    """Images (C, H, W) of a source, transformed for evaluation, with labels (-1 for an unlabeled image)."""

    def __init__(self, images: ReadableImages[Any], view: EvalView) -> None:
        self.images, self.view, self.source = images, view, images.source

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, position = self.images[index]
        labels = self.source.labels
        return self.view(image), -1 if labels is None else int(labels[position])


class MultiCropDataModule(L.LightningDataModule):
    """Batches of V crops, each (B, C, size, size), and `eval_dataset("train" | "val")` for evaluation."""

    def __init__(
        self, config: DataConfig, crops: CropsConfig, *, seed: int, bad_images: Path | None = None, labels: bool = False
    ) -> None:
        """With `labels`, training batches are `LabeledCrops`; otherwise they contain no labels."""
        super().__init__()
        self.config, self.crops, self.seed, self.bad_images, self.labels = config, crops, seed, bad_images, labels
        self.decoder = Decoder(config)
        self._loader: ResumableLoader | None = None
        self._position: dict[str, Any] | None = None

    @cached_property
    def sources(self) -> Splits:
        """Training and validation images, opened on first access."""
        return open_sources(self.config, seed=self.seed)

    @cached_property
    def backend(self) -> CropBackend:
        """The back end that creates the crops."""
        return crop_backend(self.crops, channels=self.config.channels)

    @property
    def num_images(self) -> int:
        """Training images per epoch."""
        train = self.sources.train
        return train.images if isinstance(train, ImageStream) else len(train)

    @property
    def labeled(self) -> bool:
        """Whether a k-NN evaluation is possible, because both splits have labels."""
        train, val = self.sources.train, self.sources.val
        return (
            isinstance(train, ImageSource) and train.labels is not None and val is not None and val.labels is not None
        )

    @property
    def classes(self) -> list[str]:
        """Class names; empty without labels."""
        return self.sources.train.classes or []

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def train_labels(self) -> np.ndarray:
        """Labels of the training images, int64 (n,); -1 for an unlabeled image."""
        train = self._train_images
        return np.full(len(train), -1) if train.labels is None else train.labels

    @cached_property
    def _train_images(self) -> ImageSource:
        """The training images with random access; of a stream, the first ones."""
        train = self.sources.train
        return FirstImages(train, images=STREAM_PREVIEW_IMAGES) if isinstance(train, ImageStream) else train

    @cached_property
    def _cached_images(self) -> ImageSource:
        """The training images, or `data.cache` of them. Evaluation reads the original images, so that a cache does not
        change its results."""
        return cached(
            self._train_images,
            config=self.config,
            decoder=self.decoder,
            bad_images=self.bad_images,
            workers=max(1, self.config.num_workers),
        )

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled multi-crop batches, from the position in the checkpoint on."""
        self._loader = self._train_loader()
        self._restore_position()
        return self._loader

    # Lightning saves the position of a loader, too, but restores it only in the middle of an epoch.
    def state_dict(self) -> dict[str, Any]:
        """The position of the loader, for a checkpoint; all ranks call it."""
        return {} if self._loader is None else {"position": self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position, in the existing loader (with FSDP) or in the next one."""
        self._position = state_dict.get("position")
        self._restore_position()

    def _restore_position(self) -> None:
        if self._loader is not None and self._position is not None:
            self._loader.load_state_dict(self._position)
            self._position = None

    def _train_loader(self) -> ResumableLoader:
        config, train, crops = self.config, self.sources.train, self.backend
        options = loader_options(config)
        ranks: dict[str, Any] = {"rank": rank(), "world_size": world_size()}
        ranks |= {"batch_size": config.batch_size_per_device, "seed": self.seed}
        if isinstance(train, ImageStream):
            bad = self._bad_list(train.images, self.bad_images)
            buffer: int = config.shuffle_buffer  # type: ignore[attr-defined]
            decode = self._decode(crops.decoding)
            stream = MultiCropStream(train, decode, crops, bad=bad, shuffle_buffer=buffer, **ranks)
            return StreamLoader(stream, **options)
        images = self._readable(self._cached_images, crops.decoding, self.bad_images)
        batches = MultiCropDataset(images, crops, seed=self.seed, labels=train.labels if self.labels else None)
        return MapLoader(batches, EpochBatchSampler(len(images), **ranks), **options)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment the batch on its device (`crops=device`)."""
        if isinstance(batch, LabeledCrops):
            return batch._replace(crops=self.on_after_batch_transfer(batch.crops, dataloader_idx))
        return batch.augment(self.crops) if isinstance(batch, RawCrops) else batch

    def example_crops(self, indices: list[int]) -> list[list[Tensor]]:
        """The V crops of training images, as in the first epoch."""
        images = self._readable(self._train_images, self.backend.decoding, self.bad_images)
        seeds = [crop_seed(self.seed, 0, index) for index in indices]
        batch = self.backend([images[index][0] for index in indices], seeds)
        views = batch.augment(self.crops) if isinstance(batch, RawCrops) else batch
        return [list(sample) for sample in zip(*views, strict=True)]

    def eval_dataset(self, split: str) -> EvalImages:
        """The images of `train` or `val`, transformed for evaluation, with labels."""
        source = self._train_images if split == "train" else self.sources.val
        if source is None:
            raise UserError("data: there are no validation images; set data.holdout to a share of the images.")
        decoding = "pil" if self.config.channels in (1, 3) else "pixels"
        bad_images = self.bad_images
        # A file for each split, because the share of bad images is computed for each.
        if bad_images is not None and split == "val":
            bad_images = bad_images.with_stem(f"{bad_images.stem}_val")
        return EvalImages(self._readable(source, decoding, bad_images), EvalView(self.crops))

    def object_mask(self, index: int) -> np.ndarray | None:
        """The object's pixels in validation image `index` (bool (H, W)); None if the data has no masks."""
        # The mask matches the transformed image only if that is not cropped.
        uncropped = self.crops.eval_resize == self.crops.eval_size
        val = self.sources.val
        return val.mask(index) if uncropped and isinstance(val, BuiltinImages) else None

    def check_some_images(self, count: int = 8) -> None:
        """Raise `UserError` if none of a few training images can be decoded, which means that a setting is wrong."""
        train, reason = self._train_images, ""
        if isinstance(train, FirstImages) and not len(train):
            why = f"{train.without_image} has none" if train.without_image else "its shards have no samples"
            raise UserError(
                f"data: the stream contains no image ({why}); expected samples with an image in data.image_keys or "
                "data.image_column."
            )
        decode = self._decode(self.backend.decoding)
        for index in evenly_spaced(len(train), count):
            try:
                decode(train.read(index))
                return
            except UNREADABLE as error:
                reason = reason or f"{train.describe(index)}: {why_unreadable(error)}"
        raise UserError(f"data: none of the tested images can be read ({reason})")

    def _decode(self, decoding: str) -> Callable[[Content], Any]:
        return self.decoder.pil if decoding == "pil" else self.decoder.pixels

    def _readable(self, source: ImageSource, decoding: str, bad_images: Path | None) -> ReadableImages[Any]:
        return ReadableImages(source, self._decode(decoding), bad=self._bad_list(len(source), bad_images))

    def _bad_list(self, images: int, path: Path | None) -> BadImages:
        return BadImages(path, images=images, on_error=self.config.on_error, max_bad_share=self.config.max_bad_share)
