"""A residual branch computed a few crops at a time, for CPUs: y = x + s L(f(x)), where L is a linear layer.

On a CPU the tensors that a layer saves for the gradient are expensive: new memory, whose pages the system clears one by
one, written once and read once, from outside the caches. Here only x is saved. Each tile of f(x) is used, overwritten
by the next one, and recomputed for the gradient; L is not recomputed, since the gradient does not need its output.

    forward,  tile by tile: u = f(x);  y = x + s (u W' + b)
    backward, tile by tile: u = f(x) again;  dv = s dy;  dW += dv' u;  db += sum dv;  dx = dy + f'(x) (dv W)

M rows (tokens), D width.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dino_lightning.models.kernels.dense import input_gradient, product, weight_gradient
from dino_lightning.models.kernels.packing import Shapes
from dino_lightning.runtime.precision import autocast_dtype

ROWS = 4096
"""Rows of a tile: the activations between two layers of a small network are then a few megabytes."""

MIN_ELEMENTS = 1 << 20
"""Elements of x below which everything stays in caches, and recomputing would be slower."""

Before = Callable[[Tensor, Shapes], Tensor]
"""f: tokens of some crops (m, D) -> inputs of the linear layer (m, I)."""


def is_faster(x_MD: Tensor) -> bool:
    """Whether tiles are faster for these tokens."""
    return x_MD.device.type == "cpu" and x_MD.numel() >= MIN_ELEMENTS and autocast_dtype(x_MD) == x_MD.dtype


def add_tiled_branch(
    x_MD: Tensor, scale_M1: Tensor | None, before: Before, layer: nn.Linear, *, shapes: Shapes, weights: list[Tensor]
) -> Tensor:
    """x + s L(f(x)); `weights` are all parameters of f that need gradients."""
    arguments = (x_MD, scale_M1, layer.weight, layer.bias, before, shapes, *weights)
    return _TiledBranch.apply(*arguments)  # type: ignore[return-value]


def tiles(shapes: Shapes) -> Iterator[tuple[slice, Shapes]]:
    """Rows and shapes of groups of whole crops of one resolution."""
    start = 0
    for B, N in shapes:
        each = max(1, ROWS // N)
        for first in range(0, B, each):
            crops = min(each, B - first)
            yield slice(start + first * N, start + (first + crops) * N), ((crops, N),)
        start += B * N


class _TiledBranch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        scale_M1: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        before: Before,
        shapes: Shapes,
        *weights: Tensor,
    ) -> Tensor:
        ctx.before, ctx.shapes, ctx.weights = before, shapes, weights
        ctx.save_for_backward(x_MD, scale_M1, weight)
        y_MD = torch.empty_like(x_MD)
        for rows, tile in tiles(shapes):
            branch_mD = product(before(x_MD[rows], tile), weight, bias)
            if scale_M1 is None:
                torch.add(x_MD[rows], branch_mD, out=y_MD[rows])
            else:
                torch.addcmul(x_MD[rows], branch_mD, scale_M1[rows].to(x_MD.dtype), out=y_MD[rows])
        return y_MD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_MD, scale_M1, weight = ctx.saved_tensors
        dx_MD, dweight = torch.empty_like(x_MD), torch.zeros_like(weight)
        dbias, dweights = weight.new_zeros(len(weight)), [torch.zeros_like(w) for w in ctx.weights]
        for rows, tile in tiles(ctx.shapes):
            dv_mD = dy_MD[rows] if scale_M1 is None else dy_MD[rows] * scale_M1[rows].to(dy_MD.dtype)
            with torch.enable_grad():
                x_mD = x_MD[rows].detach().requires_grad_()
                u_mI = ctx.before(x_mD, tile)
            dweight += weight_gradient(dv_mD, u_mI.detach(), weight)
            dbias += dv_mD.sum(dim=0)
            du_mI = input_gradient(dv_mD, u_mI.detach(), weight)
            dx_mD, *parts = torch.autograd.grad(u_mI, (x_mD, *ctx.weights), du_mI)
            torch.add(dy_MD[rows], dx_mD, out=dx_MD[rows])
            torch._foreach_add_(dweights, list(parts))
        return dx_MD, None, dweight, dbias, None, None, *dweights
