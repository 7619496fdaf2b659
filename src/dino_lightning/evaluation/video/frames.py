"""Frames of videos and their masks in batches, preprocessed as in the original.

H, W pixels of a stored frame, h, w pixels of the network's input, B frames.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dino_lightning.config import DataConfig
from dino_lightning.data.bad_images import UNREADABLE, BadImages, why_unreadable
from dino_lightning.data.benchmarks.davis import BrokenSequenceError, Sequence
from dino_lightning.data.decode import Decoder
from dino_lightning.evaluation.features.images import BatchLoader

SIDE_MULTIPLE = 64
"""The longer side is cropped to a multiple of this (pixels)."""

FrameIndex = tuple[int, int]
"""Index of a sequence, and of a frame in it."""


class FrameBatch(NamedTuple):
    """Successive frames of one sequence."""

    sequence: int
    first: int
    """Index of the first of them."""
    frames: Tensor
    """(B, 3, h, w) uint8."""
    labels: Tensor
    """(B, H, W) uint8: the true masks."""
    readable: bool
    """False if one of the files is unreadable; its pixels and labels are then zeros."""


def frame_size(size: tuple[int, int], *, shorter: int, patch: int) -> tuple[int, int]:
    """Height and width of the network's input: the shorter side as given, the longer cropped to a multiple of 64.

    If 64 is not a multiple of `patch`, a multiple of `patch` instead. Of a square, the width is cropped.
    """
    multiple = SIDE_MULTIPLE if SIDE_MULTIPLE % patch == 0 else patch
    height, width = size
    if height > width:
        return int(shorter * height / width // multiple * multiple), shorter
    return shorter, int(shorter * width / height // multiple * multiple)


def resize_frame(pixels_3HW: Tensor, *, size: tuple[int, int]) -> Tensor:
    """Pixels (3, h, w), uint8: bilinear between the four nearest pixels, also when shrinking, as in OpenCV."""
    if pixels_3HW.shape[1:] == size:
        return pixels_3HW.contiguous()
    scaled = F.interpolate(pixels_3HW.unsqueeze(0).float(), size=size, mode="bilinear", align_corners=False)
    return scaled.squeeze(0).round().clamp(0, 255).to(torch.uint8)


def resize_labels(labels_HW: np.ndarray, *, size: tuple[int, int]) -> np.ndarray:
    """Labels at another height and width, by nearest neighbor."""
    return np.asarray(Image.fromarray(labels_HW).resize((size[1], size[0]), Image.Resampling.NEAREST))


class Frames(Dataset[tuple[Tensor, Tensor, bool]]):
    """`frames[sequence, index]` is a frame for the network, its true labels, and whether both could be read."""

    def __init__(self, sequences: list[Sequence], *, sizes: list[tuple[int, int]], bad_images: Path) -> None:
        self.sequences, self.sizes = sequences, sizes
        self.decoder = Decoder(DataConfig())
        images = sum(len(sequence) for sequence in sequences)
        self.bad = BadImages(bad_images, images=images)

    def __getitem__(self, key: FrameIndex) -> tuple[Tensor, Tensor, bool]:
        number, index = key
        sequence, size = self.sequences[number], self.sizes[number]
        try:
            pixels_3HW = self.decoder.pixels(sequence.frames[index].read_bytes())
        except UNREADABLE as error:
            return self._broken(number, str(sequence.frames[index]), why_unreadable(error))
        try:
            labels_HW = sequence.labels(index)
        except BrokenSequenceError as error:
            return self._broken(number, *error.args)
        return resize_frame(pixels_3HW, size=size), torch.from_numpy(labels_HW), True

    def _broken(self, number: int, path: str, reason: str) -> tuple[Tensor, Tensor, bool]:
        self.bad.add(path, reason)
        blank_3hw = torch.zeros(3, *self.sizes[number], dtype=torch.uint8)
        return blank_3hw, torch.zeros(self.sequences[number].size, dtype=torch.uint8), False


def frame_batches(
    frames: Frames, numbers: list[int], *, batch_size: int, num_workers: int, device: torch.device
) -> Iterator[FrameBatch]:
    """The frames of the sequences `numbers`, in order; no batch spans two sequences."""
    batches = [
        [(number, index) for index in range(start, min(start + batch_size, len(frames.sequences[number])))]
        for number in numbers
        for start in range(0, len(frames.sequences[number]), batch_size)
    ]
    loader = BatchLoader(frames, batches, num_workers=num_workers, device=device)
    for batch, (frames_B3hw, labels_BHW, readable_B) in zip(batches, loader, strict=True):
        number, first = batch[0]
        yield FrameBatch(number, first, frames_B3hw, labels_BHW, bool(readable_B.all()))
