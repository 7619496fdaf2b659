"""Decoding all images of a source into one file, in parallel; `cache` opens it again."""

import multiprocessing
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode

from dino_lightning.data.bad_images import UNREADABLE, why_unreadable
from dino_lightning.data.decode import Decoder
from dino_lightning.data.sources.base import ImageSource
from dino_lightning.errors import UserError

CHUNK = 32
"""Images that a process decodes before it reports."""
SAMPLE = 100
"""Images decoded to estimate the size of all."""
REASON_BYTES = 1000
"""Length at which a reason is cut."""


def small_pixels(source: ImageSource, index: int, *, decoder: Decoder, resize: int) -> np.ndarray:
    """Image (H, W, C) uint8, contiguous, its shorter side at most `resize` pixels.

    Resized by torchvision on uint8 (bicubic, antialiased): on photographs within 2 of 255 levels of Pillow's.
    """
    pixels = decoder.pixels(source.read(index))
    if min(pixels.shape[-2:]) > resize:
        pixels = F.resize(pixels, [resize], InterpolationMode.BICUBIC, antialias=True)
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def bytes_needed(source: ImageSource, *, decoder: Decoder, resize: int) -> int:
    """An estimate from `SAMPLE` images, evenly spread."""
    total = 0
    sample = np.linspace(0, len(source) - 1, min(len(source), SAMPLE)).astype(int).tolist()
    for index in sample:
        try:
            total += small_pixels(source, index, decoder=decoder, resize=resize).nbytes
        except UNREADABLE as error:
            why_unreadable(error)
    return round(total / len(sample) * len(source))


class Written(NamedTuple):
    """A chunk of m images in the file."""

    start: int
    """Index of the first."""
    offsets: np.ndarray
    """Where each begins (m,)."""
    sizes: np.ndarray
    """Height and width (m, 2); 0 and the length of the reason for an unreadable one."""


class Chunks(Dataset[Written | OSError]):
    """Item k: the images of chunk k, decoded and written to `path`.

    All processes write into the one file, each image at the end as the processes count it together. An `OSError` of the
    file is an item too, for the text of a raised one gets lost between processes.
    """

    def __init__(self, source: ImageSource, *, decoder: Decoder, resize: int, path: Path) -> None:
        self.source, self.decoder, self.resize, self.path = source, decoder, resize, path
        self.end: Any = multiprocessing.Value("q", 0)

    def __len__(self) -> int:
        return -(-len(self.source) // CHUNK)

    def __getitem__(self, number: int) -> Written | OSError:
        start = number * CHUNK
        count = min(CHUNK, len(self.source) - start)
        offsets, sizes = np.zeros(count, np.int64), np.zeros((count, 2), np.int32)
        try:
            with open(self.path, "r+b") as file:
                for i in range(count):
                    offsets[i], sizes[i] = self._write(file, start + i)
        except OSError as error:
            return error
        return Written(start, offsets, sizes)

    def _write(self, file: BinaryIO, index: int) -> tuple[int, tuple[int, int]]:
        try:
            pixels = small_pixels(self.source, index, decoder=self.decoder, resize=self.resize)
            data, size = pixels.data, pixels.shape[:2]
        except UNREADABLE as error:
            data = why_unreadable(error).encode(errors="replace")[:REASON_BYTES]
            size = (0, len(data))
        with self.end.get_lock():
            offset = self.end.value
            self.end.value += data.nbytes if isinstance(data, memoryview) else len(data)
        file.seek(offset)
        file.write(data)
        return offset, size


def write_images(source: ImageSource, *, folder: Path, decoder: Decoder, resize: int, workers: int) -> dict[str, int]:
    """Write pixels.bin, offsets.npy and sizes.npy to `folder`, with a progress bar; returns numbers worth keeping.

    Each process holds one image at a time. Raises `UserError` where the folder cannot take more.
    """
    path = folder / "pixels.bin"
    path.touch()
    chunks = Chunks(source, decoder=decoder, resize=resize, path=path)
    loader = DataLoader(
        chunks,
        batch_size=None,
        num_workers=min(workers, os.cpu_count() or 1, len(chunks)),
        collate_fn=_as_it_is,
        # A loader draws a seed: of its own, or a run that builds the cache would differ from one that finds it.
        generator=torch.Generator(),
    )
    offsets, sizes = np.zeros(len(source), np.int64), np.zeros((len(source), 2), np.int32)
    with progress_bar() as bar:
        task = bar.add_task("decoding", total=len(source))
        for item in loader:
            if isinstance(item, OSError):
                raise UserError(f"data.cache: the decoded images cannot be kept in {folder.parent} ({item})")
            place = slice(item.start, item.start + len(item.offsets))
            offsets[place], sizes[place] = item.offsets, item.sizes
            bar.advance(task, len(item.offsets))
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "sizes.npy", sizes)
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # before the folder gets the name of a whole one
    return {"images": len(source), "unreadable": int((sizes[:, 0] == 0).sum()), "bytes": path.stat().st_size}


def progress_bar() -> Progress:
    """A bar of images with the time left, on stderr; nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _as_it_is(item: Any) -> Any:
    return item
