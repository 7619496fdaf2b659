"""Losses between the views of an image, as pure functions of logits.

Shapes: V student views, T teacher views, B images, K prototypes. Teacher view t and student view t are the same crop
for t < T.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_lightning.runtime.precision import at_least_float32, without_autocast


@dataclass(frozen=True)
class SoftmaxParams:
    """Temperatures and center that turn logits into probabilities."""

    student_temperature: float
    teacher_temperature: float
    center: Tensor
    """Center of the teacher's logits (1, K)."""


def cross_view_entropy(student_VBK: Tensor, teacher_TBK: Tensor, params: SoftmaxParams) -> Tensor:
    """Cross-entropy between the views of an image (equation 3 of the paper), averaged over pairs of views and images.

    Both arguments are raw logits. The teacher is centered and sharpened here, without gradient. A student view is never
    compared with the same crop of the teacher, which leaves T (V - 1) terms.

    The sum over pairs needs no log-softmax per pair: with q_v the sum of the teacher's distributions that view v is
    compared with and w_v their number,
        sum_t H(p_t, softmax(s_v)) = w_v * logsumexp(s_v) - <q_v, s_v>,
    so each student logit is read once. `chunked.py` computes the same without holding the logits.
    """
    target_TBK = sharpen(teacher_TBK, params)
    return view_entropy(student_VBK, target_TBK, temperature=params.student_temperature)


def view_entropy(student_VBK: Tensor, target_TBK: Tensor, *, temperature: float) -> Tensor:
    """`cross_view_entropy` for given target distributions."""
    V, T = len(student_VBK), len(target_TBK)
    total_BK = target_TBK.sum(dim=0)
    loss = torch.zeros((), device=student_VBK.device)
    for view, logits_BK in enumerate(student_VBK):
        scaled_BK = at_least_float32(logits_BK) / temperature
        target_BK, terms = (total_BK - target_TBK[view], T - 1) if view < T else (total_BK, T)
        if terms:
            per_image_B = terms * scaled_BK.logsumexp(dim=-1) - (target_BK * scaled_BK).sum(dim=-1)
            loss = loss + per_image_B.mean()
    return loss / (T * (V - 1))


def cross_view_distance(predicted_VBD: Tensor, target_TBD: Tensor) -> Tensor:
    """Squared distance of unit vectors, 2 - 2 cos, averaged over pairs of different views and images.

    The loss of BYOL (its equation 2) between each student view and each teacher view of another crop. This is the
    mean over teacher views; a sum over t, as in BYOL, is T times as large.
    """
    predicted_VBD, target_TBD = (F.normalize(at_least_float32(x), dim=-1) for x in (predicted_VBD, target_TBD))
    V, T = len(predicted_VBD), len(target_TBD)
    with without_autocast(predicted_VBD):
        cosine_TV = torch.einsum("tbd,vbd->tv", target_TBD, predicted_VBD) / predicted_VBD.shape[1]
    pairs = (2 - 2 * cosine_TV)[~torch.eye(T, V, dtype=torch.bool, device=cosine_TV.device)]
    return pairs.sum() / (T * (V - 1))


@torch.no_grad()
def sharpen(teacher_TBK: Tensor, params: SoftmaxParams) -> Tensor:
    """The teacher's distributions (T, B, K), in full precision: softmax of (logits - center) / temperature."""
    return ((at_least_float32(teacher_TBK) - params.center) / params.teacher_temperature).softmax(dim=-1)
