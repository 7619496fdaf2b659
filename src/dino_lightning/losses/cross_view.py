"""Losses: pure functions of logits.

Shapes: V student views, T teacher views, B images, K prototypes. Teacher view t and student view t are the same crop
for t < T.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_lightning.models.factored_logits import Factors
from dino_lightning.runtime.precision import at_least_float32, without_autocast


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
    target_TBK = sharpen(teacher_TBK, sharpness)
    return view_entropy(student_VBK, target_TBK, temperature=sharpness.student_temperature)


def view_entropy(student_VBK: Tensor, target_TBK: Tensor, *, temperature: float) -> Tensor:
    """`cross_view_entropy` with the distributions given."""
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

    The loss of BYOL (its equation 2) between each student view and each teacher view of another crop. The mean over
    views of the teacher stands before the mean over images; a sum over t, as in BYOL, is T times as much.
    """
    predicted_VBD, target_TBD = (F.normalize(at_least_float32(x), dim=-1) for x in (predicted_VBD, target_TBD))
    V, T = len(predicted_VBD), len(target_TBD)
    with without_autocast(predicted_VBD):
        cosine_TV = torch.einsum("tbd,vbd->tv", target_TBD, predicted_VBD) / predicted_VBD.shape[1]
    pairs = (2 - 2 * cosine_TV)[~torch.eye(T, V, dtype=torch.bool, device=cosine_TV.device)]
    return pairs.sum() / (T * (V - 1))


def koleo(features_BD: Tensor) -> Tensor:
    """The Kozachenko-Leonenko estimate of (negative) entropy: -mean log distance to the nearest other feature.

    Of features at length 1, so that they spread over the sphere (Sablayrolles et al. 2019, DINOv2). Which is nearest
    is found without gradient.
    """
    x_BD = F.normalize(at_least_float32(features_BD), dim=-1, eps=1e-8)
    with torch.no_grad(), without_autocast(x_BD):
        similarity_BB = x_BD @ x_BD.T
        nearest_B = similarity_BB.fill_diagonal_(-2.0).argmax(dim=1)
    distance_B = (x_BD - x_BD[nearest_B] + 1e-8).norm(dim=-1)
    return -(distance_B + 1e-8).log().mean()


def info_nce(
    query_BD: Tensor, key_BD: Tensor, *, temperature: float, negatives_ND: Tensor | None = None, first: int = 0
) -> Tensor:
    """InfoNCE (MoCo's equation 1), mean over B images: pick the key of one's own image out of many.

    All vectors have length 1. With `negatives_ND`, query b is compared with key b and with all of them. Without, the
    keys of other images are the negatives: `key_BD` may then hold those of all ranks, of which `first` is the position
    of this rank's first.
    """
    query_BD, key_BD = at_least_float32(query_BD), at_least_float32(key_BD)
    own_B = torch.arange(len(query_BD), device=query_BD.device) + first
    # The products in full precision: at a temperature of 0.2, the rounding of bfloat16 is 2 % of a probability.
    with without_autocast(query_BD):
        if negatives_ND is None:
            return F.cross_entropy(query_BD @ key_BD.T / temperature, own_B)
        own_B1 = (query_BD * key_BD).sum(dim=-1, keepdim=True)
        logits_BN = torch.cat([own_B1, query_BD @ at_least_float32(negatives_ND).T], dim=1)
        return F.cross_entropy(logits_BN / temperature, torch.zeros_like(own_B))


@torch.no_grad()
def sharpen(teacher_TBK: Tensor, sharpness: Sharpness) -> Tensor:
    """The teacher's distributions (T, B, K), in full precision: softmax of (logits - centre) / temperature."""
    return ((at_least_float32(teacher_TBK) - sharpness.center) / sharpness.teacher_temperature).softmax(dim=-1)


class OutputFigures(NamedTuple):
    """What distributions over prototypes have in common, in nats."""

    entropy: Tensor
    """Mean over images of the entropy of the target, h(p_t)."""
    divergence: Tensor
    """Mean over images of D_KL(p_t || p_s)."""
    mean_output: Tensor
    """Mean of the targets (K,)."""


@torch.no_grad()
def entropy_and_divergence(student: Factors, teacher: Factors, sharpness: Sharpness, *, rows: int) -> OutputFigures:
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
        pieces.append([share * figure for figure in output_figures(target_rK, log_p_rK)])
    return OutputFigures(*(torch.stack(parts).sum(dim=0) for parts in zip(*pieces, strict=True)))


@torch.no_grad()
def output_figures(target_NK: Tensor, log_p_NK: Tensor) -> OutputFigures:
    """The figures of targets and of logarithms of predictions."""
    entropy = torch.special.entr(target_NK).sum(dim=-1).mean()
    cross_entropy = -(target_NK * log_p_NK).sum(dim=-1).mean()
    return OutputFigures(entropy, cross_entropy - entropy, target_NK.mean(dim=0))
