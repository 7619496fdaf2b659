"""Crops of several resolutions as one long matrix of tokens.

Linear layers process each token independently, so the tokens of all crops pass them at once; attention stays within a
crop. Rows are ordered by resolution, then by crop:

    shapes = ((128, 197), (512, 37))      128 crops of 197 tokens, then 512 of 37
    rows   = 128 * 197 + 512 * 37         M

M rows, D width, h heads, S crops in all.
"""

from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = tuple[tuple[int, int], ...]
"""Number of crops and tokens per crop of each resolution."""


def pack(tokens: list[Tensor]) -> tuple[Tensor, Shapes]:
    """Join tokens (B, N, D) of several views to one matrix (M, D); neighbors of one resolution become one entry."""
    shapes: list[tuple[int, int]] = []
    for B, N, _ in (view.shape for view in tokens):
        if shapes and shapes[-1][1] == N:
            B += shapes.pop()[0]
        shapes.append((B, N))
    return joined([view.flatten(0, 1) for view in tokens]), tuple(shapes)


def joined(parts: list[Tensor]) -> Tensor:
    """Concatenate rows; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def split(x_MD: Tensor, shapes: Shapes) -> list[Tensor]:
    """Undo `pack`: tokens (B, N, D) of each resolution."""
    parts = x_MD.split([B * N for B, N in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def first_tokens(x_MD: Tensor, shapes: Shapes) -> Tensor:
    """The class token of each crop: (S, D)."""
    return joined([part_BND[:, 0] for part_BND in split(x_MD, shapes)])


def attend(qkv_M3D: Tensor, shapes: Shapes, *, heads: int, first_only: bool = False) -> list[Tensor]:
    """Self-attention within each crop: tokens (B N, D) of each resolution, or (B, D) with queries of class tokens only.

    Not joined to one matrix: PyTorch saves the output of attention, and would save the joined copy, too.
    """
    outputs = []
    for qkv_BN3D in split(qkv_M3D, shapes):
        q_BhNd, k_BhNd, v_BhNd = qkv_BN3D.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if first_only:
            q_BhNd = q_BhNd[:, :, :1]
        mixed_BhNd = F.scaled_dot_product_attention(q_BhNd, k_BhNd, v_BhNd)
        outputs.append(mixed_BhNd.transpose(1, 2).flatten(2).flatten(0, 1))
    return outputs


def attend_in_one_call(qkv_M3D: Tensor, shapes: Shapes, *, heads: int) -> Tensor:
    """The same (M, D) with PyTorch's variable-length kernel, for GPUs and half precision."""
    from torch.nn.attention.varlen import varlen_attn  # compiled for GPUs only

    q_Mhd, k_Mhd, v_Mhd = qkv_M3D.unflatten(-1, (3, heads, -1)).unbind(1)
    mixed_Mhd = varlen_attn(q_Mhd, k_Mhd, v_Mhd, *sequence_ends(shapes, qkv_M3D.device))
    assert isinstance(mixed_Mhd, Tensor)
    return mixed_Mhd.flatten(1)


def sequence_ends(shapes: Shapes, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Cumulative lengths of the crops and the longest length, for queries and keys of a variable-length kernel."""
    lengths = [N for B, N in shapes for _ in range(B)]
    ends, longest = constant((0, *accumulate(lengths)), torch.int32, device), max(lengths)
    return ends, ends, longest, longest


@cache
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Constants on the device, copied once: a copy from the host in each step would wait for the device."""
    return torch.tensor(values, dtype=dtype, device=device)


# ------------------------------------------------------------------------------------------------------- drop path


@dataclass(frozen=True)
class Subset:
    """The crops that one residual branch computes, as rows of the packed tokens."""

    rows_m: Tensor
    shapes: Shapes
    scale_m1: Tensor
    """Number of crops divided by that of kept crops, which preserves the mean of the branch."""


def sampled_scales(rates: tuple[float, ...], shapes: Shapes, device: torch.device) -> list[Tensor]:
    """Stochastic depth as in timm and the original: each crop drops a branch independently with the block's rate.

    Returns, for each block, the factors (2, M, 1) of its two branches: 0 or 1 / (1 - rate).
    """
    kept_L11 = constant(tuple(1 - rate for rate in rates), torch.float32, device).view(-1, 1, 1)
    crops = sum(B for B, _ in shapes)
    scales_L2S = (torch.rand(len(rates), 2, crops, device=device) < kept_L11) / kept_L11
    parts = [
        part_L2B[..., None].expand(-1, -1, -1, N).flatten(2)
        for part_L2B, (_, N) in zip(scales_L2S.split([B for B, _ in shapes], dim=2), shapes, strict=True)
    ]
    return list(torch.cat(parts, dim=2)[..., None].unbind(0))


def drawn_subset(rate: float, shapes: Shapes, device: torch.device) -> Subset:
    """Stochastic depth that saves time: only a fixed number of random crops of each resolution computes the branch."""
    rows, kept_shapes, scales, start = [], [], [], 0
    for B, N in shapes:
        kept = max(1, round(B * (1 - rate)))
        crops_k = torch.rand(B, device=device).argsort()[:kept]
        tokens_N = torch.arange(N, device=device)
        rows.append((start + crops_k[:, None] * N + tokens_N).flatten())
        kept_shapes.append((kept, N))
        scales.append(torch.full((kept * N, 1), B / kept, device=device))
        start += B * N
    return Subset(torch.cat(rows), tuple(kept_shapes), torch.cat(scales))


def add_branch(x_MD: Tensor, branch_MD: Tensor, scale_M1: Tensor | None) -> Tensor:
    """x + scale * branch."""
    if scale_M1 is None:
        return x_MD + branch_MD
    if branch_MD.dtype == x_MD.dtype:
        return torch.addcmul(x_MD, branch_MD, scale_M1.to(x_MD.dtype))
    return x_MD + branch_MD * scale_M1.to(branch_MD.dtype)
