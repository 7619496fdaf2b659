"""Batches with labels, for `method=supervised`. Other methods never see one."""

from typing import Any, NamedTuple

from torch import Tensor


class LabeledCrops(NamedTuple):
    """A batch of crops and what its images show."""

    crops: Any
    """V tensors (B, C, size, size), or `CutCrops` on their way to the device."""
    labels: Tensor
    """Class of each image, int64 (B,); -1 for none."""


def images_in(batch: Any) -> int:
    """Number of images B of a batch on its device, with labels or without."""
    return len(batch.labels if isinstance(batch, LabeledCrops) else batch[0])
