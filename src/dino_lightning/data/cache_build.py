"""Decodes all images of a source into one file, in parallel, for `cache`."""

import multiprocessing
import os
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torchvision.transforms.v2.functional as F
from torchvision.transforms import InterpolationMode

from dino_lightning.data.bad_images import UNREADABLE, why_unreadable
from dino_lightning.data.decode import Decoder
from dino_lightning.data.parallel import process_chunks
from dino_lightning.data.sources.base import ImageSource, evenly_spaced
from dino_lightning.errors import UserError

ESTIMATE_IMAGES = 100
"""Images that are decoded to estimate the size of all."""
MAX_REASON_BYTES = 1000
"""Stored length of the reason why an image is unreadable."""


def resized_pixels(source: ImageSource, index: int, *, decoder: Decoder, resize: int) -> np.ndarray:
    """Image (H, W, C) uint8, contiguous, with a shorter side of at most `resize` pixels.

    Resized by torchvision on uint8 (bicubic, antialiased): on photographs within 2 of 255 levels of Pillow's result.
    """
    pixels = decoder.pixels(source.read(index))
    if min(pixels.shape[-2:]) > resize:
        pixels = F.resize(pixels, [resize], InterpolationMode.BICUBIC, antialias=True)
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def bytes_needed(source: ImageSource, *, decoder: Decoder, resize: int) -> int:
    """Size of all resized images, estimated from `ESTIMATE_IMAGES` evenly spaced images."""
    total = 0
    indices = evenly_spaced(len(source), ESTIMATE_IMAGES)
    for index in indices:
        try:
            total += resized_pixels(source, index, decoder=decoder, resize=resize).nbytes
        except UNREADABLE as error:
            why_unreadable(error)
    return round(total / len(indices) * len(source))


WrittenChunk: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Start of each of m images in the file (m,), and height and width (m, 2), as in offsets.npy and sizes.npy."""


class PixelWriter:
    """Positions in the source -> the `WrittenChunk` of these images, which are decoded and written to `path`.

    All processes write to the same file, each image at the end, whose position they share. An `OSError` of the file is
    returned, because a raised one would lose its text between processes.
    """

    def __init__(self, source: ImageSource, *, decoder: Decoder, resize: int, path: Path) -> None:
        self.source, self.decoder, self.resize, self.path = source, decoder, resize, path
        self.end: Any = multiprocessing.Value("q", 0)

    def __call__(self, images: range) -> WrittenChunk | OSError:
        """Write the images."""
        offsets, sizes = np.zeros(len(images), np.int64), np.zeros((len(images), 2), np.int32)
        try:
            with open(self.path, "r+b") as file:
                for i, index in enumerate(images):
                    offsets[i], sizes[i] = self._write(file, index)
        except OSError as error:
            return error
        return offsets, sizes

    def _write(self, file: BinaryIO, index: int) -> tuple[int, tuple[int, int]]:
        try:
            pixels = resized_pixels(self.source, index, decoder=self.decoder, resize=self.resize)
            data, size = pixels.tobytes(), pixels.shape[:2]
        except UNREADABLE as error:
            data = why_unreadable(error).encode(errors="replace")[:MAX_REASON_BYTES]
            size = (0, len(data))
        with self.end.get_lock():
            offset = self.end.value
            self.end.value += len(data)
        file.seek(offset)
        file.write(data)
        return offset, size


def write_images(source: ImageSource, *, folder: Path, decoder: Decoder, resize: int, workers: int) -> dict[str, int]:
    """Write pixels.bin, offsets.npy and sizes.npy to `folder`, with a progress bar; returns the entries of meta.json.

    Each process keeps one image in memory. Raises `UserError` if the folder cannot be written.
    """
    path = folder / "pixels.bin"
    path.touch()
    writer = PixelWriter(source, decoder=decoder, resize=resize, path=path)
    offsets, sizes = np.zeros(len(source), np.int64), np.zeros((len(source), 2), np.int32)
    for images, chunk in process_chunks(writer, len(source), workers=workers, title="decoding"):
        if isinstance(chunk, OSError):
            raise UserError(f"data.cache: the decoded images cannot be written to {folder.parent} ({chunk})")
        offsets[images], sizes[images] = chunk
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "sizes.npy", sizes)
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # before the folder gets its final name
    return {"images": len(source), "unreadable": int((sizes[:, 0] == 0).sum()), "bytes": path.stat().st_size}
