"""Losses: pure functions of logits.

Shapes: V student views, T teacher views, B images, K prototypes. Teacher view t and student view t are the same crop
for t < T.
"""

import torch
from torch import Tensor

from dino_lightning.numerics import at_least_float32


def cross_view_entropy(
    student_VBK: Tensor, teacher_TBK: Tensor, *, student_temperature: float, teacher_temperature: float, center: Tensor
) -> Tensor:
    """Cross-entropy between the views of an image (equation 3 of the paper), averaged over pairs of views and images.

    Both arguments are raw logits. The teacher is centred and sharpened here, without gradient; a student view is never
    compared with the same crop of the teacher, which leaves T (V - 1) terms.

    The sum over pairs needs no log-softmax per pair: with q_v the sum of the teacher's distributions that view v is
    held against and w_v their number,
        sum_t H(p_t, softmax(s_v)) = w_v * logsumexp(s_v) - <q_v, s_v>,
    so each student logit is read once.
    """
    V, T = len(student_VBK), len(teacher_TBK)
    target_TBK = sharpen(teacher_TBK, temperature=teacher_temperature, center=center)
    total_BK = target_TBK.sum(dim=0)
    loss = torch.zeros((), device=student_VBK.device)
    for view, logits_BK in enumerate(student_VBK):
        scaled_BK = at_least_float32(logits_BK) / student_temperature
        target_BK, terms = (total_BK - target_TBK[view], T - 1) if view < T else (total_BK, T)
        if terms:
            per_image_B = terms * scaled_BK.logsumexp(dim=-1) - (target_BK * scaled_BK).sum(dim=-1)
            loss = loss + per_image_B.mean()
    return loss / (T * (V - 1))


@torch.no_grad()
def sharpen(teacher_TBK: Tensor, *, temperature: float, center: Tensor) -> Tensor:
    """The teacher's distributions (T, B, K), in full precision: softmax of (logits - centre) / temperature."""
    return ((at_least_float32(teacher_TBK) - center) / temperature).softmax(dim=-1)


@torch.no_grad()
def entropy_and_divergence(
    student_BK: Tensor, teacher_BK: Tensor, *, student_temperature: float, teacher_temperature: float, center: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean entropy h(p_t) and divergence D_KL(p_t || p_s) in nats, the two curves of the paper's figure 7.

    Their sum is the cross-entropy. Entropy ln K is collapse to uniform, entropy 0 is collapse to one prototype; in
    both the divergence goes to 0.
    """
    target_BK = sharpen(teacher_BK, temperature=teacher_temperature, center=center)
    entropy = torch.special.entr(target_BK).sum(dim=-1).mean()
    log_student_BK = (at_least_float32(student_BK) / student_temperature).log_softmax(dim=-1)
    cross_entropy = -(target_BK * log_student_BK).sum(dim=-1).mean()
    return entropy, cross_entropy - entropy
