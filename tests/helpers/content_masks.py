"""Masks that depend only on the crop, so that they are the same for any split over micro-batches and ranks."""

from typing import Any

import numpy as np
from torch import Tensor

from dino_lightning.methods.base import GLOBAL_CROPS
from dino_lightning.models.masking import Masks, draw_masks


def mask_by_content(module: Any, *, patch: int) -> Any:
    """Seed the masks of a DINO method with the first pixel of each crop."""

    def draw(_: Any, crops: list[Tensor]) -> Masks:
        return Masks.of(
            np.concatenate([mask_of(crop, patch) for view in crops[:GLOBAL_CROPS] for crop in view]), like=crops[0]
        )

    module.patches.draw = draw
    return module


def mask_of(crop_3HW: Tensor, patch: int) -> Any:
    seed = int(1e6 * abs(float(crop_3HW[0, 0, 0])))
    grid = (crop_3HW.shape[1] // patch, crop_3HW.shape[2] // patch)
    return draw_masks(np.random.default_rng(seed), 1, grid, probability=0.6, share=[0.1, 0.5])
