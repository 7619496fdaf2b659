"""Attention within each crop of packed tokens, with separate forward and backward functions, for use inside an
`autograd.Function`.

The kernels are those that `scaled_dot_product_attention` chooses, called directly.

M rows, D width, h heads, d width of a head, B crops of N tokens; see `packing`.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from dino_lightning.models.kernels.packing import Shapes, sequence_ends

aten = torch.ops.aten

Saved = tuple[Tensor | None, ...]
"""What the backward pass needs besides q, k, v and the output: `SAVED_PER_CALL` tensors per kernel call."""
SAVED_PER_CALL = 3


@cache
def is_supported(qkv_type: torch.dtype, device: torch.device, *, heads: int, width: int) -> bool:
    """Whether a kernel exists for these heads."""
    if width % heads or (width // heads) % 8 or width // heads > 128:
        return False
    if device.type == "cuda" and qkv_type != torch.float32:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type in ("cuda", "cpu")


def attention(qkv_M3D: Tensor, shapes: Shapes, *, heads: int, varlen: bool) -> tuple[Tensor, Saved, Sequence[int]]:
    """Output (M, D), tensors for the backward pass, and the kernels (`SDPBackend`) that were called."""
    if varlen:
        lengths, qkv = sequence_ends(shapes, qkv_M3D.device), qkv_M3D.unflatten(-1, (3, heads, -1)).unbind(1)
        out_Mhd, *saved, _ = aten._flash_attention_forward(*qkv, *lengths, 0.0, False, False)
        return out_Mhd.flatten(1), tuple(saved), ()
    out_MD = qkv_M3D.new_empty(len(qkv_M3D), qkv_M3D.shape[1] // 3)
    saved, kernels = [], []
    for rows, shape in _parts(shapes):
        q, k, v = _heads(qkv_M3D[rows], shape, heads)
        kernels.append(_chosen(q, k, v))
        out_BhNd, *numbers = _forward(q, k, v, kernels[-1])
        out_MD[rows].view(*shape, heads, -1).copy_(out_BhNd.transpose(1, 2))
        saved += [*numbers, *[None] * (SAVED_PER_CALL - len(numbers))]
    return out_MD, tuple(saved), kernels


def attention_backward(
    dout_MD: Tensor,
    qkv_M3D: Tensor,
    out_MD: Tensor,
    saved: Saved,
    kernels: Sequence[int],
    shapes: Shapes,
    *,
    heads: int,
    varlen: bool,
) -> list[tuple[Tensor, ...]]:
    """Gradients of q, k and v, (B N, D) each, of each resolution in turn; of all crops at once where `varlen`."""
    if varlen:
        lengths, qkv = sequence_ends(shapes, qkv_M3D.device), qkv_M3D.unflatten(-1, (3, heads, -1)).unbind(1)
        lse, seed, unused = saved
        dout_Mhd, out_Mhd = (x.unflatten(-1, (heads, -1)) for x in (dout_MD, out_MD))
        parts = aten._flash_attention_backward(dout_Mhd, *qkv, out_Mhd, lse, *lengths, 0.0, False, seed, unused)
        return [tuple(part.flatten(1) for part in parts)]
    gradients = []
    for index, (rows, shape) in enumerate(_parts(shapes)):
        of_call = saved[index * SAVED_PER_CALL : (index + 1) * SAVED_PER_CALL]
        dout_BhNd, out_BhNd = (x[rows].view(*shape, heads, -1).transpose(1, 2) for x in (dout_MD, out_MD))
        parts = _backward(dout_BhNd, _heads(qkv_M3D[rows], shape, heads), out_BhNd, of_call, kernels[index])
        gradients.append(tuple(part.transpose(1, 2).flatten(2).flatten(0, 1) for part in parts))
    return gradients


def _chosen(q: Tensor, k: Tensor, v: Tensor) -> int:
    """The kernel that `scaled_dot_product_attention` would choose."""
    return torch._fused_sdp_choice(q, k, v)


def _forward(q: Tensor, k: Tensor, v: Tensor, kernel: int) -> Any:
    """Output and saved tensors of one resolution."""
    if not q.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if kernel == SDPBackend.CUDNN_ATTENTION.value:
        out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    elif kernel == SDPBackend.FLASH_ATTENTION.value:
        out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v)
    else:
        out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return out, lse, seed, offset


def _backward(dout: Tensor, qkv: Sequence[Tensor], out: Tensor, saved: Saved, kernel: int) -> Any:
    (q, k, v), (lse, seed, offset) = qkv, saved
    N = q.shape[2]
    if not q.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, False)
    if kernel == SDPBackend.CUDNN_ATTENTION.value:
        numbers = lse, seed, offset, None, None, None, N, N, 0.0, False
        return aten._scaled_dot_product_cudnn_attention_backward(dout, q, k, v, out, *numbers)
    if kernel == SDPBackend.FLASH_ATTENTION.value:
        numbers = lse, None, None, N, N, 0.0, False, seed, offset
        return aten._scaled_dot_product_flash_attention_backward(dout, q, k, v, out, *numbers)
    numbers = lse, seed, offset, 0.0, [True, True, True, False]
    return aten._scaled_dot_product_efficient_attention_backward(dout, q, k, v, None, out, *numbers)[:3]


def _heads(qkv: Tensor, shape: tuple[int, int], heads: int) -> tuple[Tensor, ...]:
    return qkv.view(*shape, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _parts(shapes: Shapes) -> list[tuple[slice, tuple[int, int]]]:
    ends = accumulate((B * N for B, N in shapes), initial=0)
    return [(slice(*pair), shape) for pair, shape in zip(pairwise(ends), shapes, strict=True)]
