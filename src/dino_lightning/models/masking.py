"""Which patches of the global crops are hidden from the student: blocks, as in BEiT and iBOT.

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
"""Rectangles that are tried one after the other before a crop stays with what it has."""
FLATTEST = 0.3
"""Smallest ratio of a block's sides."""


@dataclass(frozen=True)
class Masks:
    """The masked patches of the first S crops of a batch, in three forms."""

    hidden: Tensor
    """(S, h, w), true where a patch is masked."""
    positions: Tensor
    """(P,), their places among all S N patches, crop after crop, in rising order."""
    weights: Tensor
    """(P,), 1 / (S x masked patches of the crop): a sum so weighted is the mean over the masked patches of each crop,
    then over all S crops, of which those without a mask count 0."""

    @classmethod
    def of(cls, mask_Shw: Mask, *, like: Tensor) -> "Masks":
        """From masks (S, h, w); on the device of `like`, weights in its type or float32. Nobody waits for the copy."""
        flat_SN = mask_Shw.reshape(len(mask_Shw), -1)
        counts_S = flat_SN.sum(axis=1)
        weights_P = 1 / (len(flat_SN) * np.repeat(counts_S, counts_S))
        full = torch.promote_types(like.dtype, torch.float32)
        arrays = torch.from_numpy(mask_Shw), torch.from_numpy(flat_SN.reshape(-1).nonzero()[0])
        return cls(*(_sent(each, like.device) for each in (*arrays, torch.from_numpy(weights_P).to(full))))

    def __len__(self) -> int:
        """P, which the host knows."""
        return len(self.positions)


def draw_masks(
    generator: np.random.Generator, crops: int, grid: tuple[int, int], *, probability: float, share: list[float]
) -> Mask:
    """Masks (S, h, w): each crop with `probability`, then of a share of its patches drawn evenly from `share`."""
    mask_Shw = np.zeros((crops, *grid), dtype=np.bool_)
    for mask_hw in mask_Shw:
        if generator.random() < probability:
            wanted = max(1, round(generator.uniform(share[0], share[1]) * mask_hw.size))
            mask_hw[...] = blocks(generator, grid, wanted=wanted)
    return mask_Shw


def blocks(generator: np.random.Generator, grid: tuple[int, int], *, wanted: int) -> Mask:
    """A mask (h, w) of rectangles that may overlap, of `wanted` patches or a few less.

    Each adds at least one patch and as many as are missing at most; its area is drawn evenly from about a ninth of the
    grid (or what is missing, if that is less) to what is missing, the logarithm of its sides' ratio evenly from
    log 0.3 to -log 0.3. A crop is done when it has all, or when none of ten rectangles fits.
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
    """A rectangle that adds from 1 to `missing` patches, or None where the one that was drawn does not."""
    h, w = mask_hw.shape
    least = min((min(h, w) // 3) ** 2, missing)
    area, log_ratio = generator.uniform(least, missing), generator.uniform(math.log(FLATTEST), -math.log(FLATTEST))
    height, width = (max(1, round(math.sqrt(area * math.exp(sign * log_ratio)))) for sign in (1, -1))
    if height > h or width > w:
        return None
    top, left = int(generator.integers(h - height + 1)), int(generator.integers(w - width + 1))
    block = slice(top, top + height), slice(left, left + width)
    return block if 0 < (~mask_hw[block]).sum() <= missing else None


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    # From pinned memory: a copy from elsewhere would wait for the device.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
