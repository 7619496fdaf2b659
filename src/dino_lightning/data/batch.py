"""Labeled batches; only `method=supervised` uses them."""

from typing import Any, NamedTuple

from torch import Tensor


class LabeledCrops(NamedTuple):
    """A batch of crops and the labels of its images."""

    crops: Any
    """V tensors (B, C, size, size), or `RawCrops` before they are augmented on the device."""
    labels: Tensor
    """Class of each image, int64 (B,); -1 for an unlabeled image."""


def num_images(batch: Any) -> int:
    """Number of images B of an augmented batch, with or without labels."""
    return len(batch.labels if isinstance(batch, LabeledCrops) else batch[0])
