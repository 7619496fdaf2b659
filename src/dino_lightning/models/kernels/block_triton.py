"""The operations between the matrix products of a transformer block, each as one pass over memory: Triton kernels.

A block at ViT-S's width is memory-bound: as single operators, sum, norm, cast to half precision and the sums of bias
gradients read and write the same tensors repeatedly.

M rows (tokens), D width, I width of the MLP, P programs with a partial sum each.
"""

import functools
from typing import Any

import torch
from torch import Tensor

PROGRAMS = 528
"""Programs that sum over rows, four for each multiprocessor of an H100. Each writes a row of partial sums."""

TILE = 2048
"""Elements that a program of a norm holds at a time: 16 of each matrix per thread."""

MAX_WIDTH = 4096
"""Largest D: a row must fit into a program."""


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed: it is not on Windows and macOS; on Linux it comes with torch's CUDA builds."""
    try:
        from dino_lightning.models.kernels import block_kernels  # noqa: F401
    except ImportError:
        return False
    return True


def _launch(name: str, grid: tuple[int, ...], device_of: Tensor, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on a tensor's device: triton launches on the current one, wherever the tensors are."""
    from dino_lightning.models.kernels import block_kernels

    with torch.cuda.device_of(device_of):
        getattr(block_kernels, name)[grid](*arguments, **constants)


def add_and_norm(
    x_MD: Tensor,
    y_MD: Tensor | None,
    scale_M1: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    *,
    eps: float,
    half: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + scale * y in the type of x, its LayerNorm as `half`, and mean and 1 / deviation of each row."""
    sum_MD, normed_MD = x_MD if y_MD is None else torch.empty_like(x_MD), torch.empty_like(x_MD, dtype=half)
    mean_M, rstd_M = x_MD.new_empty((2, len(x_MD)), dtype=torch.float32).unbind()
    _add_and_norm(x_MD, y_MD, scale_M1, weight_D, bias_D, sum_MD, normed_MD, mean_M, rstd_M, eps=eps, norm=True)
    return sum_MD, normed_MD, mean_M, rstd_M


def add(x_MD: Tensor, y_MD: Tensor, scale_M1: Tensor | None) -> Tensor:
    """x + scale * y in the type of x."""
    sum_MD = torch.empty_like(x_MD)
    nothing = [x_MD] * 2  # pointers that are not used
    _add_and_norm(x_MD, y_MD, scale_M1, *nothing, sum_MD, *nothing, x_MD, eps=0.0, norm=False)
    return sum_MD


def _add_and_norm(
    x_MD: Tensor,
    y_MD: Tensor | None,
    scale_M1: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    *outputs: Tensor,
    eps: float,
    norm: bool,
) -> None:
    M, D = x_MD.shape
    tile = _row_tile(D)
    inputs = x_MD, x_MD if y_MD is None else y_MD, x_MD if scale_M1 is None else scale_M1, weight_D, bias_D
    parts = {"ADD": y_MD is not None, "SCALED": scale_M1 is not None, "NORM": norm}
    _launch("add_and_norm", (-(-M // tile["ROWS"]),), x_MD, *inputs, *outputs, M, eps, D=D, **parts, **tile)


def norm_backward(
    dnormed_MD: Tensor,
    x_MD: Tensor,
    mean_M: Tensor,
    rstd_M: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    residual_MD: Tensor,
    *,
    scale_M1: Tensor | None = None,
    branch: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Backward pass of y = LayerNorm(x) and of x = x' + scale * branch, where x is also the residual.

    Returns the gradient of x, y once more in the type of its gradient, with `branch` the branch's gradient in that
    type, and the sums over rows (3, D): the gradients of weight and bias, and the sum of the branch's.
    """
    M, D = x_MD.shape
    tile = _row_tile(D)
    programs = min(PROGRAMS, -(-M // tile["ROWS"]))
    dx_MD, normed_MD = torch.empty_like(x_MD), torch.empty_like(dnormed_MD)
    branch_MD = torch.empty_like(dnormed_MD) if branch else None
    sums_3PD = x_MD.new_empty((2 + branch, programs, D), dtype=torch.float32)
    inputs = dnormed_MD, x_MD, mean_M, rstd_M, weight_D, bias_D, residual_MD, x_MD if scale_M1 is None else scale_M1
    outputs = dx_MD, normed_MD, x_MD if branch_MD is None else branch_MD, sums_3PD
    parts = {"BRANCH": branch, "SCALED": scale_M1 is not None}
    _launch("norm_backward", (programs,), x_MD, *inputs, *outputs, M, programs, D=D, **parts, **tile)
    return dx_MD, normed_MD, branch_MD, sums_3PD.sum(dim=1)


def scaled_with_sums(x_MD: Tensor, scale_M1: Tensor | None, *, half: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale * x as `half`, and the sums of its columns (D,) in float32."""
    out_MD = torch.empty_like(x_MD, dtype=half)
    sums_PD, grid, tile = _column_sums(x_MD)
    tensors = x_MD, x_MD if scale_M1 is None else scale_M1, out_MD, sums_PD
    _launch("scaled_with_sums", grid, x_MD, *tensors, *x_MD.shape, grid[0], SCALED=scale_M1 is not None, **tile)
    return out_MD, sums_PD.sum(dim=0)


def gelu_backward_(h_MI: Tensor, d_MI: Tensor) -> tuple[Tensor, Tensor]:
    """GELU(h) and the sums (I,) of h's gradient, which overwrites `d_MI`, the gradient of GELU(h)."""
    gelu_MI = torch.empty_like(h_MI)
    sums_PI, grid, tile = _column_sums(h_MI)
    _launch("gelu_backward", grid, h_MI, h_MI, d_MI, gelu_MI, sums_PI, *h_MI.shape, grid[0], **tile)
    return gelu_MI, sums_PI.sum(dim=0)


def pack_with_sums(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    """Gradients of q, k and v, (m, D) each, of one part of the rows after the other: packed (M, 3 D), and the sums of
    the columns (3 D,)."""
    first, D = parts[0][0], parts[0][0].shape[1]
    out_M3D = first.new_empty(sum(len(q) for q, _, _ in parts), 3 * D)
    plans = [_column_plan(len(q), D) for q, _, _ in parts]
    sums_P3D = first.new_empty((sum(down for (down, _), _ in plans), 3 * D), dtype=torch.float32)
    row = program = 0
    for three, ((down, across), tile) in zip(parts, plans, strict=True):
        q, k, v = (each.contiguous() for each in three)
        outputs = out_M3D[row : row + len(q)], sums_P3D[program : program + down]
        _launch("pack_with_sums", (down, across, 3), q, q, k, v, *outputs, len(q), D, down, **tile)
        row, program = row + len(q), program + down
    return out_M3D, sums_P3D.sum(dim=0)


def _row_tile(D: int) -> dict[str, Any]:
    """Tile of programs that hold complete rows."""
    columns = 1 << (D - 1).bit_length()
    return {"COLUMNS": columns, "ROWS": max(1, TILE // columns), "num_warps": 4 if columns <= TILE else 8}


def _column_sums(x_MD: Tensor) -> tuple[Tensor, tuple[int, int], dict[str, Any]]:
    """Memory for partial sums, the grid, and the tile."""
    grid, tile = _column_plan(*x_MD.shape)
    return x_MD.new_empty((grid[0], x_MD.shape[1]), dtype=torch.float32), grid, tile


def _column_plan(M: int, D: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and tile of programs that hold some columns of some rows."""
    tile = {"ROWS": 16, "COLUMNS": 128, "num_warps": 4}  # 256 bytes of a row in half precision
    across = -(-D // tile["COLUMNS"])
    return (max(1, min(4 * PROGRAMS // across, -(-M // tile["ROWS"]))), across), tile
