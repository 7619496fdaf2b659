"""Labeled training images of an evaluation that trains, with new augmentations in each epoch.

The order of an epoch depends on the seed and the epoch; the augmentation of an image depends on the seed, the epoch and
the image. A resumed training therefore sees the same images as an uninterrupted one, with any number of loader
processes.

    images = TrainingImages(source, transform, seed=0, blank=(3, 224, 224))
    loader = TrainingLoader(images, batch_size=128, num_workers=8, device=device)
    for images_BCHW, labels_B in loader.epoch(3): ...
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Sampler

from dino_lightning.config import DataConfig
from dino_lightning.data.batches import Key, crop_seed
from dino_lightning.data.sources.base import ImageSource
from dino_lightning.evaluation.context import Task
from dino_lightning.evaluation.features.images import BROKEN, BatchLoader, SourceImages
from dino_lightning.runtime.collectives import rank, world_size

LabeledBatch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) and labels (B,)."""


class TrainingImages(SourceImages):
    """(epoch, number) -> an augmented image and its label; (zeros of shape `blank`, `BROKEN`) for an unreadable image.

    Numbers 0 ... len - 1 count the labeled images. `transform` may draw from `random`, `numpy.random` and PyTorch: all
    three are seeded for each image and restored afterwards. Its argument is a PIL image, or a tensor (C, H, W) uint8 if
    the images have other than one or three channels.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[Image.Image], Tensor],
        *,
        seed: int,
        blank: tuple[int, int, int],
        config: DataConfig | None = None,
        bad_images: Path | None = None,
    ) -> None:
        assert source.labels is not None, "training images need labels"
        super().__init__(source, config=config, bad_images=bad_images)
        self.transform, self.seed, self.blank = transform, seed, blank
        self.labeled = np.flatnonzero(source.labels >= 0)
        self.labels = source.labels[self.labeled]

    def __len__(self) -> int:
        return len(self.labeled)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        epoch, number = key
        index = int(self.labeled[number])
        image = self.read(index)
        if image is None:
            return torch.zeros(self.blank), BROKEN
        with seeded_rngs(crop_seed(self.seed, epoch, index)):
            return self.transform(image), int(self.labels[number])


class TrainingLoader:
    """The batches of this rank, in the order of PyTorch's `DistributedSampler`, as in the original.

    Every rank has the same number of batches, so the first images of an epoch may be repeated at its end. An incomplete
    last batch is kept unless `drop_last`. A batch does not contain its unreadable images, and may be empty. With
    `repeats` of 3 (repeated augmentation, as in DeiT) an epoch of the same length shows a third of the images, each in
    3 successive augmentations, dealt to the ranks in turn.
    """

    def __init__(
        self,
        images: TrainingImages,
        *,
        batch_size: int,
        num_workers: int,
        device: torch.device,
        drop_last: bool = False,
        repeats: int = 1,
    ) -> None:
        self.order = _Order(len(images), batch_size=batch_size, seed=images.seed, drop_last=drop_last, repeats=repeats)
        collate = partial(_collate_readable, images.blank)
        self.loader = BatchLoader(
            images, self.order, num_workers=num_workers, device=device, collate=collate, persistent=True
        )

    def __len__(self) -> int:
        """Number of batches of an epoch."""
        return len(self.order)

    def epoch(self, number: int) -> Iterator[LabeledBatch]:
        """The batches of epoch `number`, counted from 0."""
        self.order.epoch = number
        yield from self.loader


def training_loader(
    task: Task, source: ImageSource, transform: Callable[[Any], Tensor], *, side: int, batch_size: int, **options: Any
) -> TrainingLoader:
    """The training batches of a task; the transform returns images of `side` pixels."""
    images = TrainingImages(
        source,
        transform,
        seed=task.seed,
        blank=(task.network.channels, side, side),
        config=cast(DataConfig, task.data),
        bad_images=task.output / "bad_images_train.txt",
    )
    return TrainingLoader(
        images, batch_size=batch_size, num_workers=task.num_workers, device=task.context.device, **options
    )


def _collate_readable(blank: tuple[int, int, int], samples: list[tuple[Tensor, int]]) -> LabeledBatch:
    readable = [(image, label) for image, label in samples if label != BROKEN]
    labels = torch.tensor([label for _, label in readable], dtype=torch.int64)
    return torch.stack([image for image, _ in readable]) if readable else torch.empty(0, *blank), labels


class _Order(Sampler[list[Key]]):
    """The keys of each batch of this rank in the epoch `epoch`."""

    def __init__(self, images: int, *, batch_size: int, seed: int, drop_last: bool, repeats: int) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.drop_last, self.repeats, self.epoch = drop_last, repeats, 0
        self.images_per_rank = -(-images // world_size())

    def __len__(self) -> int:
        full, rest = divmod(self.images_per_rank, self.batch_size)
        return full + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        numbers = torch.randperm(self.images, generator=generator).tolist()
        keys = []
        for position in range(rank(), self.images_per_rank * world_size(), world_size()):
            image, repeat = divmod(position, self.repeats)
            keys.append((self.epoch * self.repeats + repeat, numbers[image % self.images]))
        for batch in range(len(self)):
            yield keys[batch * self.batch_size : (batch + 1) * self.batch_size]


@contextmanager
def seeded_rngs(seed: int) -> Iterator[None]:
    """Seed `random`, `numpy.random` and PyTorch's CPU generator with `seed`; restore them at the end of the block."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed, which would also seed the accelerators.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
