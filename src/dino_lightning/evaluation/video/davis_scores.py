"""The metrics of DAVIS: region similarity J and boundary accuracy F of masks, and their statistics over a video.

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
"""Maximum distance of matching boundary pixels, as a share of the image diagonal."""
CHUNK_PIXELS = 2**23
"""Mask pixels that are compared at a time; limits the memory."""
BINS = 4
"""Number of parts of a video in the computation of the decay."""


@dataclass(frozen=True)
class ObjectScores:
    """The metrics of an object of a video, in percent."""

    j_mean: float
    j_recall: float
    j_decay: float
    f_mean: float
    f_recall: float
    f_decay: float

    @property
    def j_and_f_mean(self) -> float:
        """The main metric of the benchmark."""
        return (self.j_mean + self.f_mean) / 2

    def values(self) -> list[float]:
        """The values, in the order of the fields."""
        return list(asdict(self).values())


def object_scores(
    predicted_THW: Tensor, true_THW: Tensor, *, objects: int, device: torch.device | None = None
) -> list[ObjectScores]:
    """The metrics of objects 1 ... `objects` in the label maps of a whole video.

    The benchmark excludes the first frame, which is given, and the last one. If prediction and truth are both empty, J
    and F are 1.
    """
    predicted, true = predicted_THW[1:-1], true_THW[1:-1]
    chunk = max(1, CHUNK_PIXELS // max(1, predicted[0].numel()))
    scores = []
    for number in range(1, objects + 1):
        j, f = [], []
        for start in range(0, len(predicted), chunk):
            pair = [maps[start : start + chunk].to(device) == number for maps in (predicted, true)]
            j.append(region_similarity(*pair))
            f.append(boundary_accuracy(*pair))
        metrics = (*statistics(torch.cat(j).numpy()), *statistics(torch.cat(f).numpy()))
        scores.append(ObjectScores(*(100 * metric for metric in metrics)))
    return scores


def region_similarity(predicted_NHW: Tensor, true_NHW: Tensor) -> Tensor:
    """J: intersection over union of boolean masks (N,), float64 on the CPU; 1 if both are empty."""
    intersection = (predicted_NHW & true_NHW).sum(dim=(1, 2)).cpu().double()
    union = (predicted_NHW | true_NHW).sum(dim=(1, 2)).cpu().double()
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0)


def boundary_accuracy(predicted_NHW: Tensor, true_NHW: Tensor, *, tolerance: float = TOLERANCE) -> Tensor:
    """F: harmonic mean of precision and recall of boundary pixels (N,), float64 on the CPU.

    A boundary pixel matches if the other boundary has a pixel within ceil(`tolerance` x diagonal) pixels.
    """
    H, W = predicted_NHW.shape[1:]
    radius = math.ceil(tolerance * math.hypot(H, W))
    predicted, true = boundary(predicted_NHW), boundary(true_NHW)
    precision, n_predicted = _share_near(predicted, true, radius=radius)
    recall, n_true = _share_near(true, predicted, radius=radius)
    # Without boundary pixels there are no errors, and none that the other boundary could match.
    precision = torch.where(n_predicted > 0, precision, 1.0)
    recall = torch.where(n_true > 0, recall, 1.0)
    both = precision + recall
    return torch.where(both > 0, 2 * precision * recall / both.clamp(min=1e-12), 0.0)


def boundary(masks_NHW: Tensor) -> Tensor:
    """Pixels that differ from their right, lower or lower right neighbor; pixels outside the image do not count."""
    inside = F.pad(masks_NHW.unsqueeze(1).float(), (0, 1, 0, 1), mode="replicate").squeeze(1).bool()
    here = inside[:, :-1, :-1]
    return (here ^ inside[:, :-1, 1:]) | (here ^ inside[:, 1:, :-1]) | (here ^ inside[:, 1:, 1:])


def _share_near(pixels_NHW: Tensor, others_NHW: Tensor, *, radius: int) -> tuple[Tensor, Tensor]:
    """The share of `pixels` with one of `others` in a disk around them (N,), and their number (N,)."""
    N, H, W = pixels_NHW.shape
    # A disk is 2 radius + 1 row segments, and the cumulative sums of a row show whether a segment is empty. Only the
    # disks around the few boundary pixels are tested.
    sums_NHW = F.pad(others_NHW.cumsum(dim=2, dtype=torch.int32), (1, 0))
    n_M, y_M, x_M = pixels_NHW.nonzero(as_tuple=True)
    dy_R = torch.arange(-radius, radius + 1, device=pixels_NHW.device)
    half_widths = [math.isqrt(radius**2 - dy**2) for dy in range(-radius, radius + 1)]
    half_width_R = torch.tensor(half_widths, device=pixels_NHW.device)
    # A row outside the image is replaced by the border row, of which the disk contains a longer segment anyway.
    rows_MR = (y_M[:, None] + dy_R).clamp(0, H - 1)
    left_MR, right_MR = (x_M[:, None] - half_width_R).clamp(min=0), (x_M[:, None] + half_width_R + 1).clamp(max=W)
    occupied_MR = sums_NHW[n_M[:, None], rows_MR, right_MR] > sums_NHW[n_M[:, None], rows_MR, left_MR]
    matched_M = occupied_MR.any(dim=1)
    total_N = torch.bincount(n_M, minlength=N).cpu().double()
    matched_N = torch.bincount(n_M[matched_M], minlength=N).cpu().double()
    return matched_N / total_N.clamp(min=1), total_N


def statistics(values_T: np.ndarray) -> tuple[float, float, float]:
    """Mean; recall, the share above 0.5; and decay, the mean of the first quarter minus that of the last."""
    # As in the official packages, adjacent quarters share a frame, and halves are rounded up.
    edges = np.round(np.linspace(1, len(values_T), BINS + 1) + 1e-10).astype(int) - 1
    first, last = values_T[edges[0] : edges[1] + 1], values_T[edges[-2] : edges[-1] + 1]
    return float(values_T.mean()), float((values_T > 0.5).mean()), float(first.mean() - last.mean())


def mean_scores(scores: Sequence[ObjectScores]) -> ObjectScores:
    """The mean over objects, which have equal weights."""
    return ObjectScores(*(float(value) for value in np.mean([each.values() for each in scores], axis=0)))
