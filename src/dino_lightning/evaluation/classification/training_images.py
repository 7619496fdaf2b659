"""Labeled training images of an evaluation that trains: augmented anew in each epoch.

The order of an epoch depends on the seed and the epoch, the augmentation of an image on the seed, the epoch and the
image alone. So a training that goes on after an interruption sees what it would have seen, and the number of loader
processes changes nothing.

    images = TrainingImages(source, transform, seed=0, blank=(3, 224, 224))
    loader = TrainingLoader(images, batch_size=128, num_workers=8, device=device)
    for images_BCHW, labels_B in loader.epoch(3): ...
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, Sampler

from dino_lightning.config import DataConfig
from dino_lightning.data.bad_images import UNREADABLE, BadImages, why_unreadable
from dino_lightning.data.batches import Key, WorkerError, WorkerLoader, crop_seed
from dino_lightning.data.decode import Decoder
from dino_lightning.data.sources.base import ImageSource
from dino_lightning.errors import UserError
from dino_lightning.evaluation.features.images import BROKEN
from dino_lightning.runtime.collectives import rank, world_size

Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) and labels (B,)."""


class TrainingImages(Dataset[tuple[Tensor, int]]):
    """(epoch, number) -> an augmented image and its label; of an unreadable image (zeros of `blank`, `BROKEN`).

    Numbers count the images that have a label: 0 ... len - 1. `transform` may draw from `random`, `numpy.random` and
    PyTorch: all three are seeded for each image, and are afterwards as they were. It is given a PIL image, or a tensor
    (C, H, W) uint8 where the images have other than one or three channels.
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
        self.source, self.transform, self.seed, self.blank = source, transform, seed, blank
        self.known = np.flatnonzero(source.labels >= 0)
        self.labels = source.labels[self.known]
        config = config or DataConfig()
        decoder = Decoder(config)
        self.decode: Callable[[Any], Any] = decoder.pil if config.channels in (1, 3) else decoder.pixels
        self.bad = BadImages(
            bad_images, images=len(source), on_error=config.on_error, max_bad_share=config.max_bad_share
        )

    def __len__(self) -> int:
        return len(self.known)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        epoch, number = key
        index = int(self.known[number])
        try:
            image = self.decode(self.source.read(index))
        except UNREADABLE as error:
            self.bad.note(self.source.describe(index), why_unreadable(error))
            return torch.zeros(self.blank), BROKEN
        with random_states(crop_seed(self.seed, epoch, index)):
            return self.transform(image), int(self.labels[number])

    def __getitems__(self, keys: list[Key]) -> Batch | WorkerError:
        """The readable images of a batch; PyTorch's loader hands over all its keys at once."""
        try:
            samples = [self[key] for key in keys]
        except UserError as error:
            return WorkerError(str(error))
        readable = [(image, label) for image, label in samples if label != BROKEN]
        labels = torch.tensor([label for _, label in readable], dtype=torch.int64)
        if not readable:
            return torch.empty(0, *self.blank), labels
        return torch.stack([image for image, _ in readable]), labels


class TrainingLoader:
    """This rank's batches, in the order of PyTorch's `DistributedSampler`, as in the original.

    Every rank has as many batches as the others; to that end the first images of an epoch may return at its end. An
    incomplete last batch stays unless `drop_last`. A batch lacks its broken images, and may be empty for that.
    With `repeats` of 3 (repeated augmentation, as in DeiT) an epoch of the same length shows a third of the images,
    each in 3 augmentations that come one after another, dealt to the ranks like cards.
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
        workers = min(num_workers, len(self.order))
        self.loader = WorkerLoader(
            images,
            batch_sampler=self.order,
            collate_fn=_as_it_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            # Without its own generator every iterator draws a seed from the global one.
            generator=torch.Generator().manual_seed(0),
        )

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.order)

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of epoch `number`, counted from 0."""
        self.order.sampler.set_epoch(number)
        for batch in self.loader:
            if isinstance(batch, WorkerError):
                raise UserError(batch.message)
            yield batch


class _Order(Sampler[list[Key]]):
    def __init__(self, images: int, *, batch_size: int, seed: int, drop_last: bool, repeats: int) -> None:
        # The order of all ranks. It asks a data set for its length alone.
        self.sampler = DistributedSampler(range(images), 1, 0, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.batch_size, self.drop_last, self.repeats = batch_size, drop_last, repeats
        self.own = -(-images // world_size())

    def __len__(self) -> int:
        full, rest = divmod(self.own, self.batch_size)
        return full + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, numbers = self.sampler.epoch, list(self.sampler)
        keys = []
        for place in range(rank(), self.own * world_size(), world_size()):
            image, repeat = divmod(place, self.repeats)
            keys.append((epoch * self.repeats + repeat, numbers[image % len(numbers)]))
        for batch in range(len(self)):
            yield keys[batch * self.batch_size : (batch + 1) * self.batch_size]


@contextmanager
def random_states(seed: int) -> Iterator[None]:
    """`random`, `numpy.random` and PyTorch's CPU generator seeded by `seed` within, and afterwards as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed: it would seed the accelerators, too.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _as_it_is(batch: Any) -> Any:
    return batch
