"""Entropy and divergence of the outputs, the figures that show a collapse."""

from typing import NamedTuple

import torch
from torch import Tensor

from dino_lightning.losses.cross_view import SoftmaxParams, sharpen
from dino_lightning.models.factored_logits import FactoredLogits
from dino_lightning.runtime.precision import at_least_float32


class OutputStatistics(NamedTuple):
    """Statistics of distributions over prototypes, in nats."""

    entropy: Tensor
    """Mean over images of the target's entropy h(p_t)."""
    divergence: Tensor
    """Mean over images of D_KL(p_t || p_s)."""
    mean_output: Tensor
    """Mean of the targets (K,)."""


@torch.no_grad()
def entropy_and_divergence(
    student: FactoredLogits, teacher: FactoredLogits, params: SoftmaxParams, *, rows: int
) -> OutputStatistics:
    """Mean entropy h(p_t) and divergence D_KL(p_t || p_s), the two curves of the paper's figure 7, and the mean p_t.

    Row i of the student is the same crop as row i of the teacher; the student may have more rows. The two add up to the
    cross-entropy. Entropy ln K is a collapse to uniform, entropy 0 a collapse to one prototype; in both
    the divergence goes to 0. At most `rows` rows of logits are in memory at a time.
    """
    chunks = []
    for start in range(0, len(teacher), rows):
        chunk = slice(start, min(start + rows, len(teacher)))
        target_rK = sharpen(teacher.logits(chunk), params)
        log_p_rK = (at_least_float32(student.logits(chunk)) / params.student_temperature).log_softmax(dim=-1)
        share = len(target_rK) / len(teacher)
        chunks.append([share * value for value in output_statistics(target_rK, log_p_rK)])
    return OutputStatistics(*(torch.stack(parts).sum(dim=0) for parts in zip(*chunks, strict=True)))


@torch.no_grad()
def output_statistics(target_NK: Tensor, log_p_NK: Tensor) -> OutputStatistics:
    """The statistics of targets and log-predictions."""
    entropy = torch.special.entr(target_NK).sum(dim=-1).mean()
    cross_entropy = -(target_NK * log_p_NK).sum(dim=-1).mean()
    return OutputStatistics(entropy, cross_entropy - entropy, target_NK.mean(dim=0))
