"""Processing all images of a source in several processes, with a progress bar."""

import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from dino_lightning.runtime.console import progress

T = TypeVar("T")

CHUNK = 32
"""Images that a process handles before it reports."""


class _Chunks(Dataset[tuple[range, T]]):
    def __init__(self, work: Callable[[range], T], images: int) -> None:
        self.work, self.images = work, images

    def __len__(self) -> int:
        return -(-self.images // CHUNK)

    def __getitem__(self, number: int) -> tuple[range, T]:
        images = range(number * CHUNK, min((number + 1) * CHUNK, self.images))
        return images, self.work(images)


def process_chunks(work: Callable[[range], T], images: int, *, workers: int, title: str) -> Iterator[tuple[range, T]]:
    """Call `work` with chunks of `images` positions in `workers` processes (0: in this one), and yield the results.

    A result comes with its positions, in their order.
    """
    chunks = _Chunks(work, images)
    loader: Any = DataLoader(
        chunks,
        batch_size=None,
        num_workers=min(workers, os.cpu_count() or 1, len(chunks)),
        collate_fn=identity,
        worker_init_fn=_discard_stderr,
        # Otherwise the loader would draw a seed from the global generator, whose state then depends on this call.
        generator=torch.Generator(),
    )
    with progress(title, total=images) as advance:
        for positions, result in loader:
            yield positions, result
            advance(len(positions))


def identity(batch: Any) -> Any:
    """A `collate_fn` that leaves batches unchanged."""
    return batch


def _discard_stderr(_worker: int) -> None:
    """Hide the messages that libjpeg and libtiff print about every broken file."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
