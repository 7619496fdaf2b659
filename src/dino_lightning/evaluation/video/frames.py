"""Frames of videos and their masks in batches, prepared as the original prepares them.

H, W pixels of a stored frame, h, w of the one that the network sees, B frames.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino_lightning.config import DataConfig
from dino_lightning.data.bad_images import UNREADABLE, BadImages, why_unreadable
from dino_lightning.data.benchmarks.davis import BrokenSequenceError, Sequence
from dino_lightning.data.decode import Decoder

STEP = 64
"""The longer side is cut to a multiple of it (pixels)."""

GridSize = tuple[int, int]
"""Position of a sequence and of a frame in it."""


class Batch(NamedTuple):
    """Some successive frames of one sequence."""

    sequence: int
    first: int
    """Position of the first of them."""
    frames: Tensor
    """(B, 3, h, w) uint8."""
    labels: Tensor
    """(B, H, W) uint8: the true masks."""
    readable: bool
    """False where one of the files is broken; the tensors hold zeros in its place."""


def frame_size(size: tuple[int, int], *, shorter: int, patch: int) -> tuple[int, int]:
    """Height and width that the network sees: the shorter side as given, the longer cut to a multiple of `STEP`.

    Of `patch` where patches would not fit into `STEP`. Of a square, the width is cut.
    """
    step = STEP if STEP % patch == 0 else patch
    height, width = size
    if height > width:
        return int(shorter * height / width // step * step), shorter
    return shorter, int(shorter * width / height // step * step)


def resized(pixels_3HW: Tensor, *, size: tuple[int, int]) -> Tensor:
    """Pixels (3, h, w), uint8: bilinear between the four nearest also where it shrinks, as OpenCV resizes."""
    if pixels_3HW.shape[1:] == size:
        return pixels_3HW.contiguous()
    scaled = F.interpolate(pixels_3HW.unsqueeze(0).float(), size=size, mode="bilinear", align_corners=False)
    return scaled.squeeze(0).round().clamp(0, 255).to(torch.uint8)


def resized_labels(labels_HW: np.ndarray, *, size: tuple[int, int]) -> np.ndarray:
    """Labels at another height and width: the nearest pixel's."""
    return np.asarray(Image.fromarray(labels_HW).resize((size[1], size[0]), Image.Resampling.NEAREST))


class Frames(Dataset[tuple[Tensor, Tensor, bool]]):
    """`frames[sequence, index]` is a frame for the network, its true labels, and whether both could be read."""

    def __init__(self, sequences: list[Sequence], *, sizes: list[tuple[int, int]], bad_images: Path) -> None:
        self.sequences, self.sizes = sequences, sizes
        self.decoder = Decoder(DataConfig())
        images = sum(len(sequence) for sequence in sequences)
        self.bad = BadImages(bad_images, images=images, on_error="skip", max_bad_share=1.0)

    def __getitem__(self, place: GridSize) -> tuple[Tensor, Tensor, bool]:
        number, index = place
        sequence, size = self.sequences[number], self.sizes[number]
        try:
            pixels_3HW = self.decoder.pixels(sequence.frames[index].read_bytes())
        except UNREADABLE as error:
            return self._broken(place, str(sequence.frames[index]), why_unreadable(error))
        try:
            labels_HW = sequence.labels(index)
        except BrokenSequenceError as error:
            return self._broken(place, *error.args)
        return resized(pixels_3HW, size=size), torch.from_numpy(labels_HW), True

    def _broken(self, place: GridSize, path: str, reason: str) -> tuple[Tensor, Tensor, bool]:
        self.bad.add(path, reason)
        number, _ = place
        blank_3hw = torch.zeros(3, *self.sizes[number], dtype=torch.uint8)
        return blank_3hw, torch.zeros(self.sequences[number].size, dtype=torch.uint8), False


def batches_of(frames: Frames, numbers: list[int], *, batch_size: int, workers: int, pin: bool) -> Iterator[Batch]:
    """The frames of the sequences `numbers` in their order, no batch over the end of a sequence."""
    places = [
        [(number, index) for index in range(start, min(start + batch_size, len(frames.sequences[number])))]
        for number in numbers
        for start in range(0, len(frames.sequences[number]), batch_size)
    ]
    loader = DataLoader(
        frames,
        batch_sampler=places,  # pyright: ignore[reportArgumentType]
        num_workers=min(workers, len(places)),
        pin_memory=pin,
        generator=torch.Generator().manual_seed(0),
    )
    for batch, (frames_B3hw, labels_BHW, readable_B) in zip(places, loader, strict=True):
        number, first = batch[0]
        yield Batch(number, first, frames_B3hw, labels_BHW, bool(readable_B.all()))
