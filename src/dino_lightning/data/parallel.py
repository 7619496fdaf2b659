"""Processing all images of a source in several processes, with a progress bar."""

import os
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from dino_lightning.runtime.console import progress

T = TypeVar("T")

CHUNK = 32
"""Images that a process handles before it reports."""


class ImageChunks(Dataset[T]):
    """Item k is a result for chunk k of `images` images."""

    def __init__(self, images: int) -> None:
        self.images = images

    def __len__(self) -> int:
        return -(-self.images // CHUNK)

    def chunk(self, number: int) -> range:
        """The positions of the images in a chunk."""
        return range(number * CHUNK, min((number + 1) * CHUNK, self.images))


def process_chunks(chunks: ImageChunks[T], *, workers: int, title: str) -> Iterator[T]:
    """Compute every item of `chunks` in `workers` processes (0: in this one), and yield them in order."""
    loader: Any = DataLoader(
        chunks,
        batch_size=None,
        num_workers=min(workers, os.cpu_count() or 1, len(chunks)),
        collate_fn=identity,
        worker_init_fn=_discard_stderr,
        # Otherwise the loader would draw a seed from the global generator, whose state then depends on this call.
        generator=torch.Generator(),
    )
    with progress(title, total=chunks.images) as advance:
        for number, item in enumerate(loader):
            yield item
            advance(len(chunks.chunk(number)))


def identity(batch: Any) -> Any:
    """A `collate_fn` that leaves batches unchanged."""
    return batch


def _discard_stderr(_worker: int) -> None:
    """Hide the messages that libjpeg and libtiff print about every broken file."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
