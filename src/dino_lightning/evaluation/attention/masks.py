"""The class token's attention as segmentation: masks that keep a share of its mass, and their Jaccard index.

H heads, h and w patches of p x p pixels, M masses, O objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

VOID = 255
"""The label of pixels at the edge of an object, which belong to nothing."""


@dataclass(frozen=True)
class Jaccards:
    """Of one image, each between 0 and 1."""

    best: Tensor
    """(M,): for each object the head that fits it best, averaged over the objects. The figure of the paper (fig. 4)."""
    heads: Tensor
    """(M, H): each head, averaged over the objects."""
    foreground: Tensor
    """(M, H): each head against all objects as one, void pixels not counted."""


def mass_masks(attention_BHhw: Tensor, *, masses: Sequence[float]) -> Tensor:
    """Which patches make up each share of a head's attention: bool (M, B, H, h, w).

    As the original draws them: patches are sorted by attention, and those stay whose cumulative sum from the weakest on
    exceeds 1 - mass. So a mask holds no less than the mass, and of equal patches the earlier ones leave first.
    """
    flat_BHN = attention_BHhw.float().flatten(2)
    values_BHN, order_BHN = flat_BHN.sort(dim=-1, stable=True)
    cumulative_BHN = (values_BHN / values_BHN.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
    kept = [torch.zeros_like(flat_BHN, dtype=torch.bool).scatter(-1, order_BHN, cumulative_BHN > 1 - m) for m in masses]
    return torch.stack(kept).unflatten(-1, attention_BHhw.shape[-2:])


def image_jaccards(attention_Hhw: Tensor, labels_HW: Tensor, *, masses: Sequence[float]) -> Jaccards | None:
    """How the masks of one image fit its objects; None where the image has none.

    `labels_HW` (h p, w p) has 0 for background, a number for each object, and `VOID`. Masks count at the resolution of
    the labels, as if they were upsampled to it by nearest neighbor. For single objects a void pixel is background,
    as in the snippet that the authors published.
    """
    numbers = [number for number in labels_HW.unique().tolist() if number not in (0, VOID)]
    if not numbers:
        return None
    p = labels_HW.shape[-1] // attention_Hhw.shape[-1]
    kept_MHhw = mass_masks(attention_Hhw[None], masses=masses)[:, 0]
    objects_OHW = torch.stack([labels_HW == number for number in numbers])
    everywhere_HW = torch.ones_like(labels_HW, dtype=torch.bool)
    objects_MHO = jaccard(kept_MHhw, objects_OHW, within_HW=everywhere_HW, p=p)
    foreground_MH1 = jaccard(kept_MHhw, objects_OHW.any(0, keepdim=True), within_HW=labels_HW != VOID, p=p)
    return Jaccards(objects_MHO.amax(1).mean(-1), objects_MHO.mean(-1), foreground_MH1.squeeze(-1))


def jaccard(kept_MHhw: Tensor, objects_OHW: Tensor, *, within_HW: Tensor, p: int) -> Tensor:
    """Intersection over union of masks of patches and masks of pixels, float64 (M, H, O); only `within_HW` counts.

    Whole patches are kept or not: it is enough to know how many pixels of an object lie in each.
    """
    objects_Ohw = pixels_of_patches(objects_OHW & within_HW, p=p)
    within_hw = pixels_of_patches(within_HW[None], p=p)[0]
    kept_MHhw = kept_MHhw.double()
    intersection_MHO = torch.einsum("mhij,oij->mho", kept_MHhw, objects_Ohw)
    kept_MH1 = (kept_MHhw * within_hw).sum((-2, -1))[..., None]
    return intersection_MHO / (kept_MH1 + objects_Ohw.sum((-2, -1)) - intersection_MHO)


def attended_area(attention_Hhw: Tensor, *, masses: Sequence[float]) -> Tensor:
    """The share of the image that each mass takes, averaged over heads: float64 (M,). Small where heads are choosy."""
    return mass_masks(attention_Hhw[None], masses=masses).double().mean((1, 2, 3, 4))


def pixels_of_patches(masks_OHW: Tensor, *, p: int) -> Tensor:
    """How many pixels of each mask lie in each patch: float64 (O, h, w)."""
    return F.avg_pool2d(masks_OHW.double(), p, divisor_override=1)
