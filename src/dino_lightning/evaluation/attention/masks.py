"""The class token's attention as segmentation: masks with a share of its mass, and their Jaccard index.

H heads, h and w patches of p x p pixels, M masses, O objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

VOID = 255
"""The label of pixels at the edge of an object, which belong to no class."""


@dataclass(frozen=True)
class JaccardIndices:
    """The Jaccard indices of one image, from 0 to 1."""

    best: Tensor
    """(M,): the best head of each object, averaged over the objects: the paper's figure (fig. 4)."""
    heads: Tensor
    """(M, H): each head, averaged over the objects."""
    foreground: Tensor
    """(M, H): each head against the union of all objects, without void pixels."""


def mass_masks(attention_BHhw: Tensor, *, masses: Sequence[float]) -> Tensor:
    """The patches that contain each share of a head's attention: bool (M, B, H, h, w).

    As in the original, patches are sorted by attention, and a mask contains those whose cumulative sum from the weakest
    on exceeds 1 - mass. A mask thus contains at least the mass; among equal patches the earlier ones are dropped first.
    """
    flat_BHN = attention_BHhw.float().flatten(2)
    values_BHN, order_BHN = flat_BHN.sort(dim=-1, stable=True)
    cumulative_BHN = (values_BHN / values_BHN.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
    masks = [
        torch.zeros_like(flat_BHN, dtype=torch.bool).scatter(-1, order_BHN, cumulative_BHN > 1 - m) for m in masses
    ]
    return torch.stack(masks).unflatten(-1, attention_BHhw.shape[-2:])


def jaccard_indices(attention_Hhw: Tensor, labels_HW: Tensor, *, masses: Sequence[float]) -> JaccardIndices | None:
    """The Jaccard indices of one image; None if it has no object.

    `labels_HW` (h p, w p) is 0 for background, a number for each object, or `VOID`. Masks are compared at the
    resolution of the labels, as if upsampled by nearest neighbor. For single objects a void pixel counts as background,
    as in the snippet that the authors published.
    """
    numbers = [number for number in labels_HW.unique().tolist() if number not in (0, VOID)]
    if not numbers:
        return None
    p = labels_HW.shape[-1] // attention_Hhw.shape[-1]
    masks_MHhw = mass_masks(attention_Hhw[None], masses=masses)[:, 0]
    objects_OHW = torch.stack([labels_HW == number for number in numbers])
    all_HW = torch.ones_like(labels_HW, dtype=torch.bool)
    objects_MHO = jaccard(masks_MHhw, objects_OHW, within_HW=all_HW, p=p)
    foreground_MH1 = jaccard(masks_MHhw, objects_OHW.any(0, keepdim=True), within_HW=labels_HW != VOID, p=p)
    return JaccardIndices(objects_MHO.amax(1).mean(-1), objects_MHO.mean(-1), foreground_MH1.squeeze(-1))


def jaccard(masks_MHhw: Tensor, objects_OHW: Tensor, *, within_HW: Tensor, p: int) -> Tensor:
    """Intersection over union of patch masks and pixel masks inside `within_HW`, float64 (M, H, O).

    A patch is completely inside a mask or not, so the number of an object's pixels in each patch is enough.
    """
    objects_Ohw = pixels_of_patches(objects_OHW & within_HW, p=p)
    within_hw = pixels_of_patches(within_HW[None], p=p)[0]
    masks_MHhw = masks_MHhw.double()
    intersection_MHO = torch.einsum("mhij,oij->mho", masks_MHhw, objects_Ohw)
    areas_MH1 = (masks_MHhw * within_hw).sum((-2, -1))[..., None]
    return intersection_MHO / (areas_MH1 + objects_Ohw.sum((-2, -1)) - intersection_MHO)


def attended_area(attention_Hhw: Tensor, *, masses: Sequence[float]) -> Tensor:
    """The share of the image that contains each mass, averaged over heads: float64 (M,). Small for focused heads."""
    return mass_masks(attention_Hhw[None], masses=masses).double().mean((1, 2, 3, 4))


def pixels_of_patches(masks_OHW: Tensor, *, p: int) -> Tensor:
    """The number of pixels of each mask in each patch: float64 (O, h, w)."""
    return F.avg_pool2d(masks_OHW.double(), p, divisor_override=1)
