"""Losses: pure functions of logits.

Shapes: V student views, T teacher views, B images, K prototypes. Teacher view t and student view t are the same crop
for t < T.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dino_lightning.factors import Factors
from dino_lightning.numerics import at_least_float32


@dataclass(frozen=True)
class Sharpness:
    """What turns raw logits into distributions."""

    student_temperature: float
    teacher_temperature: float
    center: Tensor
    """Of the teacher's logits (1, K)."""


def cross_view_entropy(student_VBK: Tensor, teacher_TBK: Tensor, sharpness: Sharpness) -> Tensor:
    """Cross-entropy between the views of an image (equation 3 of the paper), averaged over pairs of views and images.

    Both arguments are raw logits. The teacher is centred and sharpened here, without gradient; a student view is never
    compared with the same crop of the teacher, which leaves T (V - 1) terms.

    The sum over pairs needs no log-softmax per pair: with q_v the sum of the teacher's distributions that view v is
    held against and w_v their number,
        sum_t H(p_t, softmax(s_v)) = w_v * logsumexp(s_v) - <q_v, s_v>,
    so each student logit is read once. `prototype_loss.py` computes the same without holding the logits.
    """
    V, T = len(student_VBK), len(teacher_TBK)
    target_TBK = sharpen(teacher_TBK, sharpness)
    total_BK = target_TBK.sum(dim=0)
    loss = torch.zeros((), device=student_VBK.device)
    for view, logits_BK in enumerate(student_VBK):
        scaled_BK = at_least_float32(logits_BK) / sharpness.student_temperature
        target_BK, terms = (total_BK - target_TBK[view], T - 1) if view < T else (total_BK, T)
        if terms:
            per_image_B = terms * scaled_BK.logsumexp(dim=-1) - (target_BK * scaled_BK).sum(dim=-1)
            loss = loss + per_image_B.mean()
    return loss / (T * (V - 1))


@torch.no_grad()
def sharpen(teacher_TBK: Tensor, sharpness: Sharpness) -> Tensor:
    """The teacher's distributions (T, B, K), in full precision: softmax of (logits - centre) / temperature."""
    return ((at_least_float32(teacher_TBK) - sharpness.center) / sharpness.teacher_temperature).softmax(dim=-1)


@torch.no_grad()
def entropy_and_divergence(
    student: Factors, teacher: Factors, sharpness: Sharpness, *, rows: int
) -> tuple[Tensor, Tensor]:
    """Mean entropy h(p_t) and divergence D_KL(p_t || p_s) in nats, the two curves of the paper's figure 7.

    Row i of the student is the same crop as row i of the teacher; the student may have more. Their sum is the
    cross-entropy. Entropy ln K is collapse to uniform, entropy 0 is collapse to one prototype; in both the divergence
    goes to 0. So many `rows` of logits are held at once.
    """
    entropies, cross_entropies = [], []
    for start in range(0, len(teacher), rows):
        piece = slice(start, min(start + rows, len(teacher)))
        target_rK = sharpen(teacher.logits(piece), sharpness)
        log_p_rK = (at_least_float32(student.logits(piece)) / sharpness.student_temperature).log_softmax(dim=-1)
        entropies.append(torch.special.entr(target_rK).sum(dim=-1))
        cross_entropies.append(-(target_rK * log_p_rK).sum(dim=-1))
    entropy, cross_entropy = torch.cat(entropies).mean(), torch.cat(cross_entropies).mean()
    return entropy, cross_entropy - entropy
