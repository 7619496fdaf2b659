"""The datasets that run in loader processes: they read, decode and crop the images of a batch.

The crops of an image depend only on the run's seed, the epoch and the image. So every process creates the same crops
for an image, crops differ between ranks, processes and epochs, and a run that resumes in the middle of an epoch gets
the same crops as an uninterrupted one.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from dino_lightning.data.bad_images import UNREADABLE, BadImages, ReadableImages, why_unreadable
from dino_lightning.data.batch import LabeledCrops
from dino_lightning.data.crops import CropBackend
from dino_lightning.data.shard_order import StreamPosition, read_stream
from dino_lightning.data.sources.base import Content, ImageStream, Sample
from dino_lightning.data.worker_signals import ignore_foreign_signals, sigterm_blocked
from dino_lightning.errors import UserError
from dino_lightning.runtime.memory import keep_freed_memory

Key = tuple[int, int]
"""Epoch and index of an image."""


@dataclass(frozen=True)
class WorkerError:
    """A `UserError` of a loader process, returned as a batch because PyTorch would wrap it in a traceback."""

    message: str


def crop_seed(*numbers: int) -> int:
    """A hash of the numbers with 63 bits."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(blake2b(packed, digest_size=8).digest(), "little") >> 1


class MultiCropDataset(Dataset[Any]):
    """The keys of a batch -> a batch of crops."""

    def __init__(
        self, images: ReadableImages[Any], crops: CropBackend, *, seed: int, labels: np.ndarray | None = None
    ) -> None:
        """With `labels` (n,) of all images, batches are `LabeledCrops`."""
        self.images, self.crops, self.seed, self.labels = images, crops, seed, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[Key]) -> Any:
        try:
            # An unreadable image is replaced together with its label.
            images, positions = zip(*(self.images[index] for _, index in keys), strict=True)
        except UserError as error:
            return WorkerError(str(error))
        batch = self.crops(images, [crop_seed(self.seed, *key) for key in keys])
        return batch if self.labels is None else LabeledCrops(batch, torch.from_numpy(self.labels[list(positions)]))


@dataclass(eq=False)
class MultiCropStream(IterableDataset[Any]):
    """Endless batches of crops from a stream, each with the stream position after it.

    Every loader process of every rank reads a different part: process w of W on rank r is reader r W + w.
    """

    stream: ImageStream
    decode: Callable[[Content], Any]
    crops: CropBackend
    _: KW_ONLY
    bad: BadImages
    batch_size: int
    seed: int
    shuffle_buffer: int
    rank: int
    world_size: int
    positions: list[StreamPosition | None] | None = None
    """Start position of each process of this rank."""
    first_worker: int = 0
    """The process that provides the first batch; PyTorch's loader always starts with its process 0."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        number, workers = (info.id, info.num_workers) if info else (0, 1)
        worker = (number + self.first_worker) % workers
        samples = read_stream(
            self.stream,
            seed=self.seed,
            reader=self.rank * workers + worker,
            readers=self.world_size * workers,
            shuffle_buffer=self.shuffle_buffer,
            start=self.positions[worker] if self.positions else None,
        )
        try:
            yield from self._batches(samples)
        except UserError as error:
            yield WorkerError(str(error)), None

    def _batches(self, samples: Iterator[Any]) -> Iterator[Any]:
        images, seeds = [], []
        for sample, key, position in samples:
            image = self._decoded(sample)
            if image is None:
                continue
            images.append(image)
            seeds.append(crop_seed(self.seed, *key))
            if len(images) == self.batch_size:
                yield self.crops(images, seeds), position
                images, seeds = [], []

    def _decoded(self, sample: Sample) -> Any | None:
        """The decoded image; None if it cannot be read, so that the next one of the stream replaces it."""
        try:
            if sample.content is not None:
                return self.decode(sample.content)
            reason = "the sample has no image"
        except UNREADABLE as error:
            reason = why_unreadable(error)
        self.bad.note(sample.name, reason)
        return None


def start_worker(_: int) -> None:
    """Use one thread in a loader process, keep freed memory, and leave signals to the main process."""
    ignore_foreign_signals()
    torch.set_num_threads(1)
    keep_freed_memory()


class WorkerLoader(DataLoader[Any]):
    """PyTorch's loader, whose processes leave signals to the main process from their start."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # Without its own generator every iterator would draw a seed from the global one.
        generator = torch.Generator().manual_seed(0)
        super().__init__(*arguments, worker_init_fn=start_worker, generator=generator, **options)

    def __iter__(self) -> Any:
        with sigterm_blocked():
            return super().__iter__()
