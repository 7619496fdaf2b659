"""TODO."""

from typing import NamedTuple

import torch
from torch import Tensor

from dino_lightning.losses.cross_view import SoftmaxParams, sharpen
from dino_lightning.models.factored_logits import FactoredLogits
from dino_lightning.runtime.precision import at_least_float32


class OutputStatistics(NamedTuple):
    """What distributions over prototypes have in common, in nats."""

    entropy: Tensor
    """Mean over images of the entropy of the target, h(p_t)."""
    divergence: Tensor
    """Mean over images of D_KL(p_t || p_s)."""
    mean_output: Tensor
    """Mean of the targets (K,)."""


@torch.no_grad()
def entropy_and_divergence(
    student: FactoredLogits, teacher: FactoredLogits, sharpness: SoftmaxParams, *, rows: int
) -> OutputStatistics:
    """Mean entropy h(p_t) and divergence D_KL(p_t || p_s), the two curves of the paper's figure 7, and the mean p_t.

    Row i of the student is the same crop as row i of the teacher; the student may have more. Entropy and divergence add
    up to the cross-entropy. Entropy ln K is collapse to uniform, entropy 0 is collapse to one prototype; in both the
    divergence goes to 0. So many `rows` of logits are held at once.
    """
    pieces = []
    for start in range(0, len(teacher), rows):
        piece = slice(start, min(start + rows, len(teacher)))
        target_rK = sharpen(teacher.logits(piece), sharpness)
        log_p_rK = (at_least_float32(student.logits(piece)) / sharpness.student_temperature).log_softmax(dim=-1)
        share = len(target_rK) / len(teacher)
        pieces.append([share * figure for figure in output_statistics(target_rK, log_p_rK)])
    return OutputStatistics(*(torch.stack(parts).sum(dim=0) for parts in zip(*pieces, strict=True)))


@torch.no_grad()
def output_statistics(target_NK: Tensor, log_p_NK: Tensor) -> OutputStatistics:
    """The figures of targets and of logarithms of predictions."""
    entropy = torch.special.entr(target_NK).sum(dim=-1).mean()
    cross_entropy = -(target_NK * log_p_NK).sum(dim=-1).mean()
    return OutputStatistics(entropy, cross_entropy - entropy, target_NK.mean(dim=0))
