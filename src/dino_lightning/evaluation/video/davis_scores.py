"""Figures of DAVIS: region similarity J and boundary accuracy F of masks, and their statistics over a video.

Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation" (CVPR 2016), as the
official packages for 2016 and 2017 compute them.

N masks of H x W pixels, M boundary pixels, T frames, K objects.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = 0.008
"""Largest distance of matching boundary pixels, as a share of the image's diagonal."""
PIXELS_AT_ONCE = 2**23
"""Of masks compared in one go: bounds the memory."""
BINS = 4
"""Parts of a video for the decay."""


@dataclass(frozen=True)
class ObjectScores:
    """The figures of an object of a video, in per cent."""

    j_mean: float
    j_recall: float
    j_decay: float
    f_mean: float
    f_recall: float
    f_decay: float

    @property
    def j_and_f_mean(self) -> float:
        """The benchmark's one figure."""
        return (self.j_mean + self.f_mean) / 2

    def values(self) -> list[float]:
        """In the order of the fields."""
        return list(asdict(self).values())


def object_scores(
    predicted_THW: Tensor, true_THW: Tensor, *, objects: int, device: torch.device | None = None
) -> list[ObjectScores]:
    """The figures of objects 1 ... `objects` in label maps of a whole video.

    The first frame is given and the last is left out by the benchmark. Raises no error for an object that is absent:
    where prediction and truth are both empty, J and F are 1.
    """
    predicted, true = predicted_THW[1:-1], true_THW[1:-1]
    at_once = max(1, PIXELS_AT_ONCE // max(1, predicted[0].numel()))
    found = []
    for number in range(1, objects + 1):
        j, f = [], []
        for start in range(0, len(predicted), at_once):
            pair = [maps[start : start + at_once].to(device) == number for maps in (predicted, true)]
            j.append(region_similarity(*pair))
            f.append(boundary_accuracy(*pair))
        figures = (*statistics(torch.cat(j).numpy()), *statistics(torch.cat(f).numpy()))
        found.append(ObjectScores(*(100 * figure for figure in figures)))
    return found


def region_similarity(predicted_NHW: Tensor, true_NHW: Tensor) -> Tensor:
    """J: intersection over union of boolean masks (N,), float64 on the CPU; 1 where both are empty."""
    shared = (predicted_NHW & true_NHW).sum(dim=(1, 2)).cpu().double()
    union = (predicted_NHW | true_NHW).sum(dim=(1, 2)).cpu().double()
    return torch.where(union > 0, shared / union.clamp(min=1), 1.0)


def boundary_accuracy(predicted_NHW: Tensor, true_NHW: Tensor, *, tolerance: float = TOLERANCE) -> Tensor:
    """F: harmonic mean of precision and recall of boundary pixels (N,), float64 on the CPU.

    A boundary pixel is matched where the other boundary has one within ceil(`tolerance` x diagonal) pixels of it.
    """
    H, W = predicted_NHW.shape[1:]
    radius = math.ceil(tolerance * math.hypot(H, W))
    predicted, true = boundary(predicted_NHW), boundary(true_NHW)
    precision, n_predicted = _share_near(predicted, true, radius=radius)
    recall, n_true = _share_near(true, predicted, radius=radius)
    # Without a boundary there is nothing to be wrong about, and nothing that the other one could match.
    precision = torch.where(n_predicted > 0, precision, 1.0)
    recall = torch.where(n_true > 0, recall, 1.0)
    both = precision + recall
    return torch.where(both > 0, 2 * precision * recall / both.clamp(min=1e-12), 0.0)


def boundary(masks_NHW: Tensor) -> Tensor:
    """Pixels that differ from their right, lower or lower right neighbor; there is nothing beyond the border."""
    inside = F.pad(masks_NHW.unsqueeze(1).float(), (0, 1, 0, 1), mode="replicate").squeeze(1).bool()
    here = inside[:, :-1, :-1]
    return (here ^ inside[:, :-1, 1:]) | (here ^ inside[:, 1:, :-1]) | (here ^ inside[:, 1:, 1:])


def _share_near(pixels_NHW: Tensor, others_NHW: Tensor, *, radius: int) -> tuple[Tensor, Tensor]:
    """The share of `pixels` with one of `others` in the disk around them (N,), and their number (N,)."""
    N, H, W = pixels_NHW.shape
    # Running sums along the rows tell at once whether a stretch of a row is empty, and a disk is 2 radius + 1
    # stretches: only they need looking at, and only around the few pixels that ask.
    sums_NHW = F.pad(others_NHW.cumsum(dim=2, dtype=torch.int32), (1, 0))
    n_M, y_M, x_M = pixels_NHW.nonzero(as_tuple=True)
    rise = torch.arange(-radius, radius + 1, device=pixels_NHW.device)
    widths = [math.isqrt(radius**2 - dy**2) for dy in range(-radius, radius + 1)]
    reach = torch.tensor(widths, device=pixels_NHW.device)
    # A row beyond the border becomes the last one, of which the disk has a longer stretch anyway.
    rows_MR = (y_M[:, None] + rise).clamp(0, H - 1)
    left_MR, right_MR = (x_M[:, None] - reach).clamp(min=0), (x_M[:, None] + reach + 1).clamp(max=W)
    some_MR = sums_NHW[n_M[:, None], rows_MR, right_MR] > sums_NHW[n_M[:, None], rows_MR, left_MR]
    matched_M = some_MR.any(dim=1)
    total_N = torch.bincount(n_M, minlength=N).cpu().double()
    matched_N = torch.bincount(n_M[matched_M], minlength=N).cpu().double()
    return matched_N / total_N.clamp(min=1), total_N


def statistics(values_T: np.ndarray) -> tuple[float, float, float]:
    """Mean; recall, the share above 0.5; and decay, the mean of the first quarter less that of the last."""
    # As in the official packages the quarters share their borders, and halves are rounded up.
    edges = np.round(np.linspace(1, len(values_T), BINS + 1) + 1e-10).astype(int) - 1
    first, last = values_T[edges[0] : edges[1] + 1], values_T[edges[-2] : edges[-1] + 1]
    return float(values_T.mean()), float((values_T > 0.5).mean()), float(first.mean() - last.mean())


def mean_scores(scores: Sequence[ObjectScores]) -> ObjectScores:
    """Over objects, each with the same weight."""
    return ObjectScores(*(float(value) for value in np.mean([each.values() for each in scores], axis=0)))
