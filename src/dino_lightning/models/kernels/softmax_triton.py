"""DINO's loss and its gradient on a chunk of logits, as two Triton kernels: for GPUs, in place.

Shapes: V student views, T teacher views, r images of the chunk, K prototypes. Teacher view t and student view t are the
same crop for t < T. The reference implementation is `losses.cross_view.cross_view_entropy` and its derivative.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from dino_lightning.models.kernels.block_triton import has_triton

LARGEST_BLOCK = 4096
"""Prototypes that a program processes at a time."""

LOGITS_PER_THREAD = 8
"""One 16-byte load of half-precision logits. With many threads per row, few rows are processed at a time, so that the
second pass should find its row in the L2 cache. Chosen by reasoning, not by measurement."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available(tensor: Tensor) -> bool:
    """Whether the kernels support this tensor: on a GPU, not in double precision, and with triton installed."""
    return tensor.is_cuda and tensor.dtype in DTYPES and has_triton()


@torch.no_grad()
def loss_and_gradient_(
    student_VrK: Tensor,
    teacher_TrK: Tensor,
    center_K: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    gradient_scale: float,
) -> Tensor:
    """Equation 3 of the paper per student row, (V, r) in float32; the student's logits become their gradient.

    Both arguments are raw logits, neither divided nor centered. With s = student / student_temperature,
    p_t = softmax((teacher_t - center) / teacher_temperature), q_v the sum of the p_t of the crops other than v and w_v
    their number (T - 1 for v < T, else T), which is the sum of q_v:

        loss[v, r]        = sum_t H(p_t, softmax(s_v)) = w_v * logsumexp(s_v) - <q_v, s_v>
        student_VrK[v, r] ← gradient_scale * (w_v * softmax(s_v) - q_v)     = gradient_scale * d loss[v, r] / d s

    In the student's own dtype, float32, bfloat16 or float16, the gradient is rounded once: all arithmetic is float32.
    float16 has steps of 6e-8 next to 0, so the scale of mixed precision belongs in `gradient_scale`. Rows may have any
    stride; along K the memory is contiguous. Nothing here waits for the device.

    Bytes moved: each student logit is read twice and written once, 3 V r K times the size of the dtype. Each teacher
    logit is read once for the statistics and once by every view of another crop, V times in all. Repeated reads are
    meant for the L2 cache, as are those of the center.

    Raises:
        ValueError: shapes, dtype or layout that the kernels cannot take.
    """
    # A kernel would read out of bounds without an error.
    if student_VrK.shape[1:] != teacher_TrK.shape[1:] or center_K.shape != student_VrK.shape[2:]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (student_VrK, teacher_TrK, center_K))
        raise ValueError(f"expected shapes (V, r, K), (T, r, K) and (K,), not {shapes}")
    if student_VrK.dtype not in DTYPES:
        raise ValueError(f"expected student logits in float32, bfloat16 or float16, not {student_VrK.dtype}")
    if any(x.stride(-1) != 1 for x in (student_VrK, teacher_TrK, center_K) if x.shape[-1] > 1):
        raise ValueError("expected logits and center contiguous along K")
    if len({x.device for x in (student_VrK, teacher_TrK, center_K)}) > 1:
        raise ValueError("expected student, teacher and center on one device")
    from dino_lightning.models.kernels import softmax_kernels

    (V, r, K), T = student_VrK.shape, len(teacher_TrK)
    block = min(LARGEST_BLOCK, 1 << (K - 1).bit_length())
    warps = max(1, block // (32 * LOGITS_PER_THREAD))
    constants: dict[str, Any] = {"T": T, "K": K, "BLOCK": block, "num_warps": warps}
    empty = functools.partial(torch.empty, dtype=torch.float32, device=student_VrK.device)
    maximum_rT, total_rT, loss_rV = empty(r, T), empty(r, T), empty(r, V)
    student_view, student_image, _ = student_VrK.stride()
    teacher_view, teacher_image, _ = teacher_TrK.stride()
    inverse_teacher = 1 / teacher_temperature
    with torch.cuda.device_of(student_VrK):  # triton launches on the current device, wherever the tensors are
        softmax_kernels.teacher_statistics[(r * T,)](
            teacher_TrK, center_K, maximum_rT, total_rT, inverse_teacher, teacher_view, teacher_image, **constants
        )
        tensors = student_VrK, teacher_TrK, center_K, maximum_rT, total_rT, loss_rV
        factors = 1 / student_temperature, inverse_teacher, float(gradient_scale)
        strides = student_view, student_image, teacher_view, teacher_image
        softmax_kernels.loss_and_gradient[(r * V,)](*tensors, *factors, V, *strides, **constants)
    return loss_rV.T
