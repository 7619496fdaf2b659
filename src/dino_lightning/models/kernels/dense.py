"""Linear layers fused with the operation before them: y = f(x) W' + b, where f is nothing, LayerNorm or GELU.

Two things differ from `torch.nn.Linear`; the results are the same except for rounding.

Memory: only the input of f is saved for the gradient, and f(x) is recomputed in the backward pass. In a transformer
block this saves six of sixteen saved token widths at the cost of two cheap passes.

Speed on x86 CPUs: PyTorch computes float32 matrix products with MKL, which does not use all instructions of processors
other than Intel's. It computes convolutions with oneDNN, which does; and a linear layer is a 1 x 1 convolution.

M rows, I inputs, O outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dino_lightning.runtime.precision import autocast_dtype, without_autocast

MIN_INPUTS, MIN_PRODUCTS = 20480, 1 << 20
"""Elements up to which PyTorch does not use oneDNN, and multiplications below which its set-up costs too much."""

VECTORS = ("AVX2", "AVX512")
"""CPU capabilities with which oneDNN is known to be faster."""


def dense(x: Tensor, layer: nn.Linear) -> Tensor:
    """`layer(x)` for x (..., I)."""
    return _call(x, layer, None, gelu=False)


def norm_dense(x: Tensor, norm: nn.LayerNorm, layer: nn.Linear) -> Tensor:
    """`layer(norm(x))` for x (..., I)."""
    return _call(x, layer, norm, gelu=False)


def gelu_dense(x: Tensor, layer: nn.Linear) -> Tensor:
    """`layer(gelu(x))` for x (..., I), with the exact GELU."""
    return _call(x, layer, None, gelu=True)


def _call(x: Tensor, layer: nn.Linear, norm: nn.LayerNorm | None, *, gelu: bool) -> Tensor:
    if torch.compiler.is_compiling():  # the compiler decides itself what to save
        x = norm(x) if norm is not None else F.gelu(x) if gelu else x
        return layer(x)
    flat_MI = x.reshape(-1, x.shape[-1])
    scale, shift, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    y_MO = _Dense.apply(flat_MI, layer.weight, layer.bias, scale, shift, eps, gelu)
    return y_MO.view(*x.shape[:-1], -1)  # type: ignore[union-attr]


class _Dense(torch.autograd.Function):
    """forward:  a = f(x);  y = a W' + b          saved: x, W, and of LayerNorm the mean and 1 / deviation of each row
    backward: a = f(x) again;  dW = dy' a;  db = sum dy;  da = dy W;  dx = f'(x) da
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *prologue: Any) -> Tensor:
        scale, shift, eps, gelu = prologue
        half = autocast_dtype(x)
        ctx.gelu, ctx.types = gelu, (weight.dtype, None if bias is None else bias.dtype)
        with without_autocast(x):
            mean = deviation = None
            a = x
            if scale is not None:
                a, mean, deviation = torch.native_layer_norm(x, x.shape[-1:], scale, shift, eps)
                ctx.eps = eps
            elif gelu:
                a = F.gelu(x)
            weight = weight.to(half)
            y = product(a.to(half), weight, None if bias is None else bias.to(half))
        ctx.save_for_backward(x, weight, scale, shift, mean, deviation)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, scale, shift, mean, deviation = ctx.saved_tensors
        weight_type, bias_type = ctx.types
        dscale = dshift = None
        with without_autocast(x):
            dy = dy.contiguous()
            dweight = None
            if ctx.needs_input_grad[1]:
                a = x
                if scale is not None:
                    a = torch.native_layer_norm(x, x.shape[-1:], scale, shift, ctx.eps)[0]
                elif ctx.gelu:
                    a = F.gelu(x)
                dweight = weight_gradient(dy, a.to(weight.dtype), weight).to(weight_type)
                del a  # as large as the largest tensor here, and the rest needs memory
            wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[3]
            da = input_gradient(dy, x, weight) if wanted else None
            dbias = None if bias_type is None else dy.sum(dim=0).to(bias_type)
            dx = da
            if da is not None and scale is not None:
                dx, dscale, dshift = torch.ops.aten.native_layer_norm_backward(
                    da.to(x.dtype), x, x.shape[-1:], mean, deviation, scale, shift, [True, True, True]
                )
            elif da is not None and ctx.gelu:
                da = da.to(x.dtype)
                dx = torch.ops.aten.gelu_backward.grad_input(da, x, grad_input=da)
        dx = None if dx is None else dx.to(x.dtype)
        return dx, dweight, dbias, dscale, dshift, None, None


def product(x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W' + b: (M, O). Without autograd."""
    grid = _grid(x_MI, weight_OI)
    if grid is None:
        return F.linear(x_MI, weight_OI, bias_O)
    return _rows(F.conv2d(_pixels(x_MI, grid), weight_OI[:, :, None, None], bias_O))


def input_gradient(dy_MO: Tensor, x_MI: Tensor, weight_OI: Tensor) -> Tensor:
    """Gradient of `product` by x (M, I); only the shape of x is used."""
    grid = _grid(x_MI, weight_OI) if x_MI.dtype == weight_OI.dtype else None
    if grid is None:
        return dy_MO @ weight_OI
    return _rows(_convolution_gradients(dy_MO, x_MI, weight_OI, grid, [True, False, False])[0])


def weight_gradient(dy_MO: Tensor, x_MI: Tensor, weight_OI: Tensor) -> Tensor:
    """Gradient of `product` by the weight (O, I)."""
    grid = _grid(x_MI, weight_OI)
    if grid is None:
        return dy_MO.T @ x_MI
    return _convolution_gradients(dy_MO, x_MI, weight_OI, grid, [False, True, False])[1].view_as(weight_OI)


def _convolution_gradients(dy: Tensor, x: Tensor, weight: Tensor, grid: tuple[int, int], wanted: list[bool]) -> Any:
    tensors = _pixels(dy, grid), _pixels(x, grid), weight[:, :, None, None]
    return torch.ops.aten.convolution_backward(*tensors, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, wanted)


def _grid(x_MI: Tensor, weight_OI: Tensor) -> tuple[int, int] | None:
    """Height and width of an image whose pixels are the rows of x; None if a matrix product is faster."""
    if x_MI.device.type != "cpu" or x_MI.dtype != torch.float32 or not x_MI.is_contiguous():
        return None
    if x_MI.numel() <= MIN_INPUTS or x_MI.numel() * len(weight_OI) < MIN_PRODUCTS or torch.get_num_threads() == 1:
        return None  # PyTorch would not use oneDNN with one thread
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() not in VECTORS:
        return None
    rows = len(x_MI)
    # Both sides above 1: otherwise its strides would not identify it as channels-last.
    width = next((w for w in (16, 8, 4, 2, 3, 5, 7) if rows % w == 0 and rows > w), None)
    return None if width is None else (rows // width, width)


def _pixels(x_MI: Tensor, grid: tuple[int, int]) -> Tensor:
    return x_MI.view(1, *grid, -1).permute(0, 3, 1, 2)


def _rows(picture: Tensor) -> Tensor:
    return picture.permute(0, 2, 3, 1).reshape(-1, picture.shape[1])
