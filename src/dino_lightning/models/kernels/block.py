"""A transformer block over packed tokens as one autograd function, for GPUs, with few passes over memory.

    forward:  a = LN1(x)           q, k, v = a Wq' + bq     o = attention     u = o Wp' + bp
              x2 = x + s1 u        a2 = LN2(x2)             h = a2 W1' + b1   v = GELU(h) W2' + b2
              y = x2 + s2 v

Matrix products and attention are PyTorch's; the operations between them are the kernels of `block_triton`. Saved for
the gradient are x, x2, qkv, o and h; the kernels that need norms and GELU recompute them. A block is one node of
autograd: with single operators the host needs longer for its 40 nodes than a GPU for a small network.

The results are those of `packed_block.packed_pass` except for rounding: sums of branches and of bias gradients are not
rounded to half precision. M rows (tokens), D width, s1 and s2 (M, 1) from stochastic depth.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dino_lightning.models.kernels import block_triton
from dino_lightning.models.kernels.attention import attention, attention_backward, is_supported
from dino_lightning.models.kernels.packing import Shapes
from dino_lightning.runtime.precision import autocast_dtype, without_autocast

HALF = (torch.bfloat16, torch.float16)


def available(x_MD: Tensor, block: Any) -> bool:
    """Whether this function supports these tokens."""
    kind, D = autocast_dtype(x_MD), x_MD.shape[1]
    if not (x_MD.is_cuda and x_MD.dtype in (torch.float32, *HALF) and kind in (torch.float32, *HALF)):
        return False
    layers = block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2
    if D > block_triton.MAX_WIDTH or any(layer.bias is None for layer in layers) or not block_triton.has_triton():
        return False
    return is_supported(kind, x_MD.device, heads=block.attn.num_heads, width=D)


def fused_block(block: Any, x_MD: Tensor, shapes: Shapes, scales: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """The block's output (M, D); `scales` are the factors of its two branches."""
    norms = cast("tuple[nn.LayerNorm, nn.LayerNorm]", (block.norm1, block.norm2))
    modules = norms[0], block.attn.qkv, block.attn.proj, norms[1], block.mlp.fc1, block.mlp.fc2
    weights = [parameter for module in modules for parameter in (module.weight, module.bias)]
    how = shapes, block.attn.num_heads, block.attention == "varlen", (norms[0].eps, norms[1].eps)
    return _Block.apply(x_MD.contiguous(), *scales, how, *weights)  # type: ignore[return-value]


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, s1: Tensor | None, s2: Tensor | None, how: tuple[Any, ...], *weights: Tensor
    ) -> Tensor:
        ctx.how, ctx.half, ctx.types = how, autocast_dtype(x), [weight.dtype for weight in weights]
        shapes, heads, varlen, (eps1, eps2) = how
        g1, b1, _, _, _, _, g2, b2, *_ = weights
        with without_autocast(x):
            wq, bq, wp, bp, w1, c1, w2, c2 = _cast([*weights[2:6], *weights[8:]], ctx.half)
            _, a, mean1, rstd1 = block_triton.add_and_norm(x, None, None, g1, b1, eps=eps1, half=ctx.half)
            qkv = F.linear(a, wq, bq)
            o, saved, ctx.kernels = attention(qkv, shapes, heads=heads, varlen=varlen)
            u = F.linear(o, wp, bp)
            x2, a, mean2, rstd2 = block_triton.add_and_norm(x, u, s1, g2, b2, eps=eps2, half=ctx.half)
            del u
            h = F.linear(a, w1, c1)
            del a
            y = block_triton.add(x2, F.linear(F.gelu(h), w2, c2), s2)
        matrices = wq, wp, w1, w2
        ctx.save_for_backward(x, s1, s2, x2, qkv, o, h, mean1, rstd1, mean2, rstd2, g1, b1, g2, b2, *matrices, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, s1, s2, x2, qkv, o, h, mean1, rstd1, mean2, rstd2, g1, b1, g2, b2, wq, wp, w1, w2, *saved = ctx.saved_tensors
        shapes, heads, varlen, _ = ctx.how
        half, sums = ctx.half, block_triton.norm_backward
        with without_autocast(x):
            dy = dy.contiguous()
            dv, dc2 = block_triton.scaled_with_sums(dy, s2, half=half)
            dh = dv @ w2
            v, dc1 = block_triton.gelu_backward_(h, dh)
            dw2 = _weight_gradient(dv, v)
            del v, dv
            dx2, a, du, (dg2, db2, dbp) = sums(dh @ w1, x2, mean2, rstd2, g2, b2, dy, scale_M1=s1, branch=True)
            assert du is not None
            dw1 = _weight_gradient(dh, a)
            del dh, a
            dwp = _weight_gradient(du, o)
            kind = {"heads": heads, "varlen": varlen}
            parts = attention_backward(du @ wp, qkv, o, tuple(saved), ctx.kernels, shapes, **kind)
            del du
            dqkv, dbq = block_triton.pack_with_sums(parts)
            del parts
            dx, a, _, (dg1, db1) = sums(dqkv @ wq, x, mean1, rstd1, g1, b1, dx2, branch=False)
            dwq = _weight_gradient(dqkv, a)
        gradients = dg1, db1, dwq, dbq, dwp, dbp, dg2, db2, dw1, dc1, dw2, dc2
        return dx, None, None, None, *(g.to(kind) for g, kind in zip(gradients, ctx.types, strict=True))


def _cast(parameters: list[Tensor], half: torch.dtype) -> list[Tensor]:
    """All parameters as `half`, with one kernel."""
    if all(parameter.dtype == half for parameter in parameters):
        return parameters
    memory = parameters[0].new_empty(sum(parameter.numel() for parameter in parameters), dtype=half)
    parts = memory.split([parameter.numel() for parameter in parameters])
    copies = [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]
    torch._foreach_copy_(copies, parameters)
    return copies


def _weight_gradient(dy_MO: Tensor, x_MI: Tensor) -> Tensor:
    """dy' x (O, I), of half-precision inputs in float32, so that the sum is not rounded to half precision."""
    if x_MI.is_cuda and x_MI.dtype in HALF:
        return torch.mm(dy_MO.T, x_MI, out_dtype=torch.float32)
    return dy_MO.T @ x_MI
