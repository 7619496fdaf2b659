"""The images of an evaluation: each exactly once, with its label; an unreadable image is recorded and left out.

Training replaces an unreadable image with the next one, but an evaluation would then count that one twice.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dino_lightning.config import CropsConfig, DataConfig
from dino_lightning.data.bad_images import UNREADABLE, BadImages, why_unreadable
from dino_lightning.data.batches import WorkerError, WorkerLoader
from dino_lightning.data.crops import EvalView
from dino_lightning.data.crops.pil import Normalized
from dino_lightning.data.decode import Decoder
from dino_lightning.data.sources.base import ImageSource
from dino_lightning.data.sources.mapped_arrays import ImageFiles, MappedArrays, pack_paths
from dino_lightning.errors import UserError
from dino_lightning.models.frozen import FrozenNetwork

BROKEN = -2
"""The label of an image that could not be read; its pixels are zeros. -1 is the label of an unlabeled image."""

View = Callable[[Image.Image | Tensor], Tensor]
"""Converts a decoded image to the network's input (C, H, W)."""


class SourceImages(Dataset[Any]):
    """Reads and decodes the images of a source, and records unreadable ones in the file `bad_images`."""

    def __init__(
        self, source: ImageSource, *, config: DataConfig | None = None, bad_images: Path | None = None
    ) -> None:
        self.source = source
        config = config or DataConfig()
        self.decoder = Decoder(config)
        self.decode: Callable[[Any], Any] = self.decoder.pil if config.channels in (1, 3) else self.decoder.pixels
        self.bad = BadImages(
            bad_images, images=len(source), on_error=config.on_error, max_bad_share=config.max_bad_share
        )

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Any:
        """A PIL image, or a tensor (C, H, W) if there are other than 1 or 3 channels; None for an unreadable image."""
        try:
            return self.decode(self.source.read(index))
        except UNREADABLE as error:
            self.bad.note(self.source.describe(index), why_unreadable(error))
            return None


class ViewedImages(SourceImages):
    """(image, label) of a source through a view; (zeros of shape `blank`, `BROKEN`) for an unreadable image."""

    def __init__(
        self,
        source: ImageSource,
        view: View,
        *,
        blank: tuple[int, int, int],
        config: DataConfig | None = None,
        bad_images: Path | None = None,
    ) -> None:
        super().__init__(source, config=config, bad_images=bad_images)
        self.view, self.blank = view, blank

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, labels = self.read(index), self.source.labels
        if image is None:
            return torch.zeros(self.blank), BROKEN
        return self.view(image), -1 if labels is None else int(labels[index])


class BatchLoader:
    """Batches of a dataset from loader processes, without a change of the global random state.

    `batches` is a sequence or sampler of lists of keys. A `UserError` in a loader process is raised again here.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batches: Any,
        *,
        num_workers: int,
        device: torch.device,
        collate: Callable[[list[Any]], Any] = default_collate,
        persistent: bool = False,
    ) -> None:
        workers = min(num_workers, len(batches))
        self.loader = WorkerLoader(
            _ErrorsAsValues(dataset),
            batch_sampler=batches,
            collate_fn=partial(_collate_unless_failed, collate),
            num_workers=workers,
            persistent_workers=persistent and workers > 0,
            pin_memory=device.type == "cuda",
        )

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            if isinstance(batch, WorkerError):
                raise UserError(batch.message)
            yield batch


class _ErrorsAsValues(Dataset[Any]):
    """A dataset that returns a `WorkerError` instead of raising: PyTorch would wrap the error into a traceback."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: list[Any]) -> list[Any] | WorkerError:
        """The samples of a batch; PyTorch's loader passes all keys of a batch at once."""
        try:
            return [self.dataset[key] for key in keys]
        except UserError as error:
            return WorkerError(str(error))


def _collate_unless_failed(collate: Callable[[list[Any]], Any], samples: list[Any] | WorkerError) -> Any:
    return samples if isinstance(samples, WorkerError) else collate(samples)


class ListedFiles(ImageFiles):
    """The image files at `paths`, without labels."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__("", arrays=MappedArrays(pack_paths(map(os.fsencode, paths))), classes=None)


def center_view(network: FrozenNetwork, *, resize: int | None = None, size: int | None = None) -> EvalView:
    """Shorter side to `resize` (bicubic), center of `size`, normalized; by default as the checkpoint says.

    With only `size`, the ratio of `resize` to `size` remains that of the checkpoint.
    """
    if size is None:
        size = network.size
        resize = resize or network.resize
    resize = resize or round(size * network.resize / network.size)
    return EvalView(CropsConfig(mean=network.mean, std=network.std, eval_resize=resize, eval_size=size))


def center_images(
    network: FrozenNetwork,
    source: ImageSource,
    *,
    resize: int | None = None,
    size: int | None = None,
    config: DataConfig | None = None,
    bad_images: Path | None = None,
) -> ViewedImages:
    """The images of a source through `center_view`."""
    view, side = center_view(network, resize=resize, size=size), size or network.size
    blank = (network.channels, side, side)
    return ViewedImages(source, view, blank=blank, config=config, bad_images=bad_images)


def class_names(source: ImageSource, indices: Sequence[int]) -> list[str | None]:
    """The class of each image, None if unknown."""
    if source.classes is None or source.labels is None:
        return [None] * len(indices)
    return [source.classes[label] if label >= 0 else None for label in source.labels[list(indices)].tolist()]


def normalization(network: FrozenNetwork) -> Normalized:
    """Converts an image to the network's normalized input."""
    return Normalized(CropsConfig(mean=network.mean, std=network.std))
