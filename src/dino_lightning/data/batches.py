"""What loader processes do: read, decode and crop the images of a batch.

The crops of an image depend on the run's seed, the epoch and the image alone. So they are the same whichever process
makes them, they differ between all ranks, processes and epochs, and a run that goes on in the middle of an epoch gets
the crops that it would have got.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from dino_lightning.data.worker_signals import held_back, obey_parent_alone
from dino_lightning.errors import UserError
from dino_lightning.runtime.memory import keep_freed_memory

Key = tuple[int, int]
"""Epoch and index of an image."""


@dataclass(frozen=True)
class WorkerError:
    """A `UserError` on its way out of a loader process, where PyTorch would wrap it into a traceback."""

    message: str


def crop_seed(*numbers: int) -> int:
    """63 bits that stand for the numbers."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(blake2b(packed, digest_size=8).digest(), "little") >> 1


class MultiCropDataset(Dataset[Any]):
    """Keys -> a batch of crops. PyTorch's loader hands over all keys of a batch at once."""

    def __init__(
        self, images: ReadableImages[Any], crops: CropBackend, *, seed: int, labels: np.ndarray | None = None
    ) -> None:
        """With the labels (n,) of all images, batches are `LabeledCrops`."""
        self.images, self.crops, self.seed, self.labels = images, crops, seed, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[Key]) -> Any:
        try:
            # An image that cannot be read is replaced, and its label with it.
            images, positions = zip(*(self.images[index] for _, index in keys), strict=True)
        except UserError as error:
            return WorkerError(str(error))
        batch = self.crops(images, [crop_seed(self.seed, *key) for key in keys])
        return batch if self.labels is None else LabeledCrops(batch, torch.from_numpy(self.labels[list(positions)]))


class MultiCropStream(IterableDataset[Any]):
    """Endless batches of crops from a stream, each with the place in the stream behind it.

    Every loader process of every rank reads its own part: process w of W on rank r reads as number r W + w.
    """

    def __init__(
        self,
        stream: ImageStream,
        decode: Callable[[Content], Any],
        crops: CropBackend,
        *,
        bad: BadImages,
        batch_size: int,
        seed: int,
        shuffle_buffer: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.stream, self.decode, self.crops, self.bad = stream, decode, crops, bad
        self.batch_size, self.seed, self.shuffle_buffer = batch_size, seed, shuffle_buffer
        self.rank, self.world_size = rank, world_size
        self.places: list[StreamPosition | None] | None = None
        """Where each process of this rank goes on."""
        self.first = 0
        """The process whose turn is first: PyTorch's loader begins with its number 0."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        number, workers = (info.id, info.num_workers) if info else (0, 1)
        own = (number + self.first) % workers
        samples = read_stream(
            self.stream,
            seed=self.seed,
            reader=self.rank * workers + own,
            readers=self.world_size * workers,
            shuffle_buffer=self.shuffle_buffer,
            start=self.places[own] if self.places else None,
        )
        try:
            yield from self._batches(samples)
        except UserError as error:
            yield WorkerError(str(error)), None

    def _batches(self, samples: Iterator[Any]) -> Iterator[Any]:
        images, seeds = [], []
        for sample, key, place in samples:
            image = self._decoded(sample)
            if image is None:
                continue
            images.append(image)
            seeds.append(crop_seed(self.seed, *key))
            if len(images) == self.batch_size:
                yield self.crops(images, seeds), place
                images, seeds = [], []

    def _decoded(self, sample: Sample) -> Any | None:
        """None where the image cannot be read: the next one of the stream takes its place."""
        try:
            if sample.content is not None:
                return self.decode(sample.content)
            reason = "the sample has no image"
        except UNREADABLE as error:
            reason = why_unreadable(error)
        self.bad.note(sample.name, reason)
        return None


def start_worker(_: int) -> None:
    """One thread per loader process, memory that is kept, and signals that are left to the main process."""
    obey_parent_alone()
    torch.set_num_threads(1)
    keep_freed_memory()


class WorkerLoader(DataLoader[Any]):
    """PyTorch's loader, whose processes leave signals to the main process from their first moment on."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, worker_init_fn=start_worker, **options)

    def __iter__(self) -> Any:
        with held_back():
            return super().__iter__()
