"""A transformer block that also processes packed tokens, the crops of all resolutions at once."""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino_lightning.models.kernels import block as whole_block
from dino_lightning.models.kernels import tiles
from dino_lightning.models.kernels.dense import dense, gelu_dense, norm_dense
from dino_lightning.models.kernels.packing import (
    Shapes,
    Subset,
    add_branch,
    attend,
    attend_in_one_call,
    first_tokens,
    joined,
)

Drop = Tensor | tuple[Subset, Subset] | None
"""Stochastic depth of a block: factors of its two branches (2, M, 1), the crops that compute them, or None."""


class PackedBlock(Block):
    """timm's block, which also accepts packed tokens (M, D)."""

    attention: str = "split"
    checkpointed: bool = False
    pass_function: "Callable[..., Tensor] | None" = None
    """`packed_pass`, compiled; None without compilation."""

    def forward(self, x: Tensor, *args: Any, shapes: Shapes | None = None, **options: Any) -> Tensor:  # type: ignore[override]
        """timm's forward pass over tokens (B, N, D); with `shapes`, `packed_pass` over packed tokens."""
        if shapes is None:
            return super().forward(x, *args, **options)
        run = self.pass_function or packed_pass
        if self.checkpointed and torch.is_grad_enabled():
            # No random numbers inside: the dropped branches are drawn outside.
            return checkpoint(run, self, x, shapes, use_reentrant=False, preserve_rng_state=False, **options)
        return run(self, x, shapes, **options)


def packed_pass(block: PackedBlock, x_MD: Tensor, shapes: Shapes, *, drop: Drop = None, last: bool = False) -> Tensor:
    """A pre-norm transformer block over packed tokens: (M, D).

    With `last`, only the class tokens (S, D) are computed: nothing else of the last block is read.
    """
    if isinstance(drop, tuple):
        for branch, subset in zip((_attention, _mlp), drop, strict=True):
            part_mD = branch(block, x_MD[subset.rows_m], subset.shapes) * subset.scale_m1
            x_MD = x_MD.index_add(0, subset.rows_m, part_mD.to(x_MD.dtype))
        return first_tokens(x_MD, shapes) if last else x_MD
    first, second = (None, None) if drop is None else drop.unbind(0)
    if not (last or block.checkpointed or torch.compiler.is_compiling()) and tiles.is_faster(x_MD):
        return _tiled_pass(block, x_MD, shapes, first, second)
    if not (last or torch.compiler.is_compiling()) and whole_block.available(x_MD, block):
        return whole_block.fused_block(block, x_MD, shapes, (first, second))
    branch_MD = _attention(block, x_MD, shapes, first_only=last)
    if last:
        x_MD = first_tokens(x_MD, shapes)
        first, second = (None if scale is None else first_tokens(scale, shapes) for scale in (first, second))
    x_MD = add_branch(x_MD, branch_MD, first)
    return add_branch(x_MD, _mlp(block, x_MD, shapes), second)


def _tiled_pass(
    block: PackedBlock, x_MD: Tensor, shapes: Shapes, first: Tensor | None, second: Tensor | None
) -> Tensor:
    attention, mlp = cast(Any, block.attn), cast(Any, block.mlp)
    norms = cast("tuple[nn.LayerNorm, nn.LayerNorm]", (block.norm1, block.norm2))

    def attended(x_mD: Tensor, shapes: Shapes) -> Tensor:
        return joined(attend(norm_dense(x_mD, norms[0], attention.qkv), shapes, heads=attention.num_heads))

    def hidden(x_mD: Tensor, shapes: Shapes) -> Tensor:
        return F.gelu(norm_dense(x_mD, norms[1], mlp.fc1))

    weights = [
        [*norm.parameters(), *layer.parameters()] for norm, layer in zip(norms, (attention.qkv, mlp.fc1), strict=True)
    ]
    x_MD = tiles.add_tiled_branch(x_MD, first, attended, attention.proj, shapes=shapes, weights=weights[0])
    return tiles.add_tiled_branch(x_MD, second, hidden, mlp.fc2, shapes=shapes, weights=weights[1])


def _attention(block: PackedBlock, x_MD: Tensor, shapes: Shapes, *, first_only: bool = False) -> Tensor:
    layers, norm = cast(Any, block.attn), cast(nn.LayerNorm, block.norm1)
    qkv_M3D = norm_dense(x_MD, norm, layers.qkv)
    if block.attention == "varlen" and not first_only:
        return dense(attend_in_one_call(qkv_M3D, shapes, heads=layers.num_heads), layers.proj)
    parts = attend(qkv_M3D, shapes, heads=layers.num_heads, first_only=first_only)
    return joined([dense(part, layers.proj) for part in parts])


def _mlp(block: PackedBlock, x_MD: Tensor, shapes: Shapes) -> Tensor:
    layers, norm = cast(Any, block.mlp), cast(nn.LayerNorm, block.norm2)
    return gelu_dense(norm_dense(x_MD, norm, layers.fc1), layers.fc2)


@cache
def compiled_pass(backend: str = "inductor") -> Callable[..., Tensor]:
    """`packed_pass` compiled by `torch.compile`, shared by all blocks."""
    return torch.compile(packed_pass, dynamic=False, fullgraph=True, backend=backend)
