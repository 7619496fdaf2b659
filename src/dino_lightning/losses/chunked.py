"""The cross-entropy between views, computed in chunks so that the logits of a batch are never all in memory.

With K prototypes the logits of a batch, (V + T) B x K, are the largest tensor of a step, and the loss reads them
several times. Here a few images at a time pass through prototypes, loss and gradient, and their logits are freed.

    for each chunk of r images:
        t = teacher embeddings W_t'                 (T, r, K)     p = softmax((t - c) / tau_t)
        s = student embeddings W_s'                 (V, r, K)
        loss += w_v logsumexp(s_v / tau_s) - <q_v, s_v> / tau_s   q_v: sum of p over the teacher's other views
        s <- w_v softmax(s_v / tau_s) - q_v                       the gradient, in place
        d embeddings = s W_s;  d W_s += s' embeddings

The forward pass computes the gradients, too, while the logits of a chunk are in memory; the backward pass only
multiplies them. Equation 3 of the paper; `losses.cross_view.cross_view_entropy` is the reference implementation.

V student views, T teacher views, B images, r images of a chunk, K prototypes, D width of the bottleneck.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dino_lightning.losses.cross_view import SoftmaxParams
from dino_lightning.models.factored_logits import FactoredLogits
from dino_lightning.models.kernels import softmax_triton
from dino_lightning.models.kernels.dense import input_gradient, product
from dino_lightning.runtime.precision import at_least_float32, autocast_dtype, without_autocast

HALF_SCALE = 16.0
"""Factor of gradients in float16: its smallest normal number is above 1 / K. Sums over 2,000 rows do not overflow."""


def chunked_cross_view_entropy(
    student: FactoredLogits, teacher: FactoredLogits, params: SoftmaxParams, *, images: int, rows: int
) -> Tensor:
    """`cross_view_entropy` between V B crops of the student and T B crops of the teacher, B = `images` per view.

    The student's embeddings and prototypes receive gradients. A chunk has as many images as fit into `rows` rows of the
    student's logits, but at least one.
    """
    factors = student.embeddings, student.prototypes, teacher.embeddings, teacher.prototypes
    return _ChunkedLoss.apply(*factors, params, images, rows, None)  # type: ignore[return-value]


def chunked_row_entropy(
    student: FactoredLogits, teacher: FactoredLogits, params: SoftmaxParams, weights_P: Tensor, *, rows: int
) -> Tensor:
    """The weighted sum of the cross-entropies between row p of the teacher and row p of the student.

    The rows are split into two views, and the teacher's views are swapped: the loss compares each student view with the
    other teacher view, which after the swap holds the same rows.
    """
    P, half = len(student), -(-len(student) // 2)
    if not P:
        return student.embeddings.new_zeros((), dtype=weights_P.dtype)
    student_SD, teacher_SD = (F.pad(each.embeddings, (0, 0, 0, 2 * half - P)) for each in (student, teacher))
    swapped_SD = torch.cat([teacher_SD[half:], teacher_SD[:half]])
    relative_S = F.pad(weights_P * (2 * half), (0, 2 * half - P))  # about 1, where half precision is most accurate
    factors = student_SD, student.prototypes, swapped_SD, teacher.prototypes
    return _ChunkedLoss.apply(*factors, params, half, rows, relative_S)  # type: ignore[return-value]


class _ChunkedLoss(torch.autograd.Function):
    """The mean over images and pairs of views; its gradients by embeddings (V B, D) and prototypes (K, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        student_SD: Tensor,
        student_KD: Tensor,
        teacher_SD: Tensor,
        teacher_KD: Tensor,
        params: SoftmaxParams,
        images: int,
        rows: int,
        weights_S: Tensor | None,
    ) -> Tensor:
        half = autocast_dtype(student_SD)
        full, scale = torch.promote_types(half, torch.float32), HALF_SCALE if half == torch.float16 else 1.0
        weights_VB = None if weights_S is None else weights_S.view(-1, images)

        def add(chunk: slice) -> None:
            """Add the images of a chunk; its logits are freed when this function returns."""
            embeddings_VrD, teacher_TrD = embeddings_VBD[:, chunk], teacher_TBD[:, chunk]
            shape, embeddings_RD = embeddings_VrD.shape[:2], embeddings_VrD.flatten(0, 1)
            logits_VrK = product(embeddings_RD, weight_KD).unflatten(0, shape)
            teacher_TrK = product(teacher_TrD.flatten(0, 1), teacher_weight_KD).unflatten(0, teacher_TrD.shape[:2])
            step = softmax_triton.loss_and_gradient_ if softmax_triton.available(logits_VrK) else loss_and_gradient_
            losses_Vr = step(
                logits_VrK,
                teacher_TrK,
                params.center.flatten(),
                student_temperature=params.student_temperature,
                teacher_temperature=params.teacher_temperature,
                gradient_scale=scale,
            )
            gradient_RK = logits_VrK.flatten(0, 1)
            dembeddings_VrD = input_gradient(gradient_RK, embeddings_RD, weight_KD).unflatten(0, shape)
            if weights_VB is not None:  # applied to small tensors, not to the logits
                weights_Vr = weights_VB[:, chunk]
                losses_Vr, dembeddings_VrD = losses_Vr * weights_Vr, dembeddings_VrD * weights_Vr[..., None]
                embeddings_RD = (embeddings_RD * weights_Vr.reshape(-1, 1)).to(embeddings_RD.dtype)
            loss.add_(losses_Vr.sum())
            dembeddings_VBD[:, chunk] = dembeddings_VrD
            if gradient_RK.dtype == full:
                dweight_KD.addmm_(gradient_RK.T, embeddings_RD)
            else:
                dweight_KD.add_(gradient_RK.T @ embeddings_RD)

        with without_autocast(student_SD):
            embeddings_VBD, teacher_TBD = (x.to(half).unflatten(0, (-1, images)) for x in (student_SD, teacher_SD))
            weight_KD, teacher_weight_KD = student_KD.to(half), teacher_KD.to(half)
            V, T = len(embeddings_VBD), len(teacher_TBD)
            loss = torch.zeros((), dtype=full, device=student_SD.device)
            dembeddings_VBD = torch.empty_like(embeddings_VBD, dtype=full)
            dweight_KD = torch.zeros_like(weight_KD, dtype=full)
            images_per_chunk = max(1, rows // V)
            for start in range(0, images, images_per_chunk):
                add(slice(start, start + images_per_chunk))
            terms = images * T * (V - 1)
            factor = 1 / (terms * params.student_temperature * scale)
            ctx.gradients = dembeddings_VBD.flatten(0, 1).mul_(factor), dweight_KD.mul_(factor)
        ctx.types = student_SD.dtype, student_KD.dtype
        return loss / terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss allows one backward pass only: its gradients are scaled in place")
        gradients, ctx.gradients = ctx.gradients, None
        return *(each.mul_(dloss).to(kind) for each, kind in zip(gradients, ctx.types, strict=True)), *[None] * 6


def loss_and_gradient_(
    student_VrK: Tensor,
    teacher_TrK: Tensor,
    center_K: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    gradient_scale: float,
) -> Tensor:
    """The losses (V, r) of a chunk, summed over the teacher's views; overwrites `student_VrK` with the scaled gradient.

    The gradient is that of the logits divided by their temperature: w_v softmax(s_v) - q_v, in the dtype of the logits.
    `models/kernels/softmax_triton.py` does the same on a GPU.
    """
    T = len(teacher_TrK)
    target_TrK = ((at_least_float32(teacher_TrK) - center_K) / teacher_temperature).softmax(dim=-1)
    total_rK = target_TrK.sum(dim=0)
    losses = []
    for view, student_rK in enumerate(student_VrK):
        target_rK, terms = (total_rK - target_TrK[view], T - 1) if view < T else (total_rK, T)
        # In place: on a CPU each pass over the logits costs more than its arithmetic.
        log_p_rK = at_least_float32(student_rK).div_(student_temperature).log_softmax(dim=-1)
        losses.append(-torch.einsum("rk,rk->r", target_rK, log_p_rK))
        gradient_rK = log_p_rK.exp_()
        if terms != 1:
            gradient_rK.mul_(terms)
        gradient_rK.sub_(target_rK)
        student_rK.copy_(gradient_rK if gradient_scale == 1 else gradient_rK.mul_(gradient_scale))
    return torch.stack(losses)
