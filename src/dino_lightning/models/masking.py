"""Random masks over the patches of the global crops that are hidden from the student: blocks, as in BEiT and iBOT.

S crops, h x w patches of each, N = h w, P masked patches in all.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Mask = NDArray[np.bool_]

ATTEMPTS = 10
"""Rectangles that are tried before a crop keeps a smaller mask."""
MIN_ASPECT = 0.3
"""Smallest ratio of a block's sides."""


@dataclass(frozen=True)
class Masks:
    """The masked patches of the first S crops of a batch, in three forms."""

    hidden: Tensor
    """(S, h, w), true where a patch is masked."""
    positions: Tensor
    """(P,), indices of the masked patches among all S N patches, ascending."""
    weights: Tensor
    """(P,), 1 / (S x masked patches of the crop): the weighted sum is the mean over the masked patches of each crop,
    then over all S crops, where crops without a mask count 0."""

    @classmethod
    def of(cls, mask_Shw: Mask, *, like: Tensor) -> "Masks":
        """From masks (S, h, w), on the device of `like`, weights in its dtype or float32. The copy is asynchronous."""
        flat_SN = mask_Shw.reshape(len(mask_Shw), -1)
        counts_S = flat_SN.sum(axis=1)
        weights_P = 1 / (len(flat_SN) * np.repeat(counts_S, counts_S))
        full = torch.promote_types(like.dtype, torch.float32)
        arrays = torch.from_numpy(mask_Shw), torch.from_numpy(flat_SN.reshape(-1).nonzero()[0])
        return cls(*(_to_device(each, like.device) for each in (*arrays, torch.from_numpy(weights_P).to(full))))

    def __len__(self) -> int:
        """P, known on the host."""
        return len(self.positions)


def draw_masks(
    generator: np.random.Generator, crops: int, grid: tuple[int, int], *, probability: float, share: list[float]
) -> Mask:
    """Masks (S, h, w): each crop is masked with `probability`, over a share of its patches uniform in `share`."""
    mask_Shw = np.zeros((crops, *grid), dtype=np.bool_)
    for mask_hw in mask_Shw:
        if generator.random() < probability:
            wanted = max(1, round(generator.uniform(share[0], share[1]) * mask_hw.size))
            mask_hw[...] = blocks(generator, grid, wanted=wanted)
    return mask_Shw


def blocks(generator: np.random.Generator, grid: tuple[int, int], *, wanted: int) -> Mask:
    """A mask (h, w) of overlapping rectangles, with `wanted` patches or a few less.

    Each rectangle adds at least one patch and at most as many as are missing. Its area is uniform between about a ninth
    of the grid (or the missing patches, if fewer) and the missing patches, the logarithm of its aspect ratio uniform
    between log 0.3 and -log 0.3. The mask is complete when no patch is missing, or when none of ten rectangles fits.
    """
    mask_hw, missing = np.zeros(grid, dtype=np.bool_), wanted
    while missing:
        block = next(filter(None, (_block(generator, mask_hw, missing) for _ in range(ATTEMPTS))), None)
        if block is None:
            break
        missing -= int((~mask_hw[block]).sum())
        mask_hw[block] = True
    return mask_hw


def _block(generator: np.random.Generator, mask_hw: Mask, missing: int) -> tuple[slice, slice] | None:
    """A random rectangle, or None if it does not add 1 to `missing` patches."""
    h, w = mask_hw.shape
    least = min((min(h, w) // 3) ** 2, missing)
    area, log_ratio = generator.uniform(least, missing), generator.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT))
    height, width = (max(1, round(math.sqrt(area * math.exp(sign * log_ratio)))) for sign in (1, -1))
    if height > h or width > w:
        return None
    top, left = int(generator.integers(h - height + 1)), int(generator.integers(w - width + 1))
    block = slice(top, top + height), slice(left, left + width)
    return block if 0 < (~mask_hw[block]).sum() <= missing else None


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    # Only copies from pinned memory are asynchronous.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
