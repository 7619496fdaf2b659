"""The Triton kernels of `block_triton`, in a separate file because it imports triton, which is not always installed.

Matrices are contiguous, (M, D) or (M, I), with M rows. In the kernels with sums, a program processes
every `programs`-th group of rows and writes its own sums at the end, without atomics, so that results are bit-identical
in each run. All arithmetic is float32. Row offsets are 64-bit.
"""

import triton
import triton.language as tl


@triton.jit
def add_and_norm(
    x_MD,
    y_MD,
    scale_M,
    weight_D,
    bias_D,
    sum_MD,
    normed_MD,
    mean_M,
    rstd_M,
    M,
    eps,
    D: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """sum = x + scale * y, and LayerNorm of the sum; either part can be left out."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows[:, None] < M) & (columns[None, :] < D)
    offsets = rows[:, None].to(tl.int64) * D + columns[None, :]
    x = tl.load(x_MD + offsets, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        y = tl.load(y_MD + offsets, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            y *= tl.load(scale_M + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
        # Normalize the rounded sum, because the backward pass reads that one.
        rounded = (x + y).to(sum_MD.dtype.element_ty)
        tl.store(sum_MD + offsets, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if NORM:
        mean = tl.sum(x, axis=1) / D
        distance = tl.where(columns[None, :] < D, x - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(distance * distance, axis=1) / D + eps)
        weight = tl.load(weight_D + columns, mask=columns < D, other=0.0).to(tl.float32)
        bias = tl.load(bias_D + columns, mask=columns < D, other=0.0).to(tl.float32)
        normed = distance * rstd[:, None] * weight[None, :] + bias[None, :]
        tl.store(normed_MD + offsets, normed.to(normed_MD.dtype.element_ty), mask=inside)
        tl.store(mean_M + rows, mean, mask=rows < M)
        tl.store(rstd_M + rows, rstd, mask=rows < M)


@triton.jit
def norm_backward(
    dnormed_MD,
    x_MD,
    mean_M,
    rstd_M,
    weight_D,
    bias_D,
    residual_MD,
    scale_M,
    dx_MD,
    normed_MD,
    branch_MD,
    sums_3PD,
    M,
    programs,
    D: tl.constexpr,
    BRANCH: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dx = residual + LayerNorm's gradient; LayerNorm's output again; and branch = scale * dx, the gradient of the
    branch that was added to x. The sums of columns are the gradients of weight, bias and the branch's bias.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    weight = tl.load(weight_D + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_D + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbranch = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(program * ROWS, M, programs * ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < M) & (columns[None, :] < D)
        offsets = rows[:, None].to(tl.int64) * D + columns[None, :]
        dy = tl.load(dnormed_MD + offsets, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_MD + offsets, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_M + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
        rstd = tl.load(rstd_M + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
        normal = tl.where(inside, (x - mean) * rstd, 0.0)
        tl.store(normed_MD + offsets, (normal * weight + bias).to(normed_MD.dtype.element_ty), mask=inside)
        dweight += dy * normal
        dbias += dy
        inner = dy * weight
        along = (tl.sum(inner * normal, axis=1) / D)[:, None]
        level = (tl.sum(inner, axis=1) / D)[:, None]
        residual = tl.load(residual_MD + offsets, mask=inside, other=0.0).to(tl.float32)
        dx = residual + (inner - level - normal * along) * rstd
        tl.store(dx_MD + offsets, dx.to(dx_MD.dtype.element_ty), mask=inside)
        if BRANCH:
            if SCALED:
                dx *= tl.load(scale_M + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
            tl.store(branch_MD + offsets, dx.to(branch_MD.dtype.element_ty), mask=inside)
            dbranch += tl.where(inside, dx, 0.0)
    own = sums_3PD + program * D + columns
    tl.store(own, tl.sum(dweight, axis=0), mask=columns < D)
    tl.store(own + programs * D, tl.sum(dbias, axis=0), mask=columns < D)
    if BRANCH:
        tl.store(own + 2 * programs * D, tl.sum(dbranch, axis=0), mask=columns < D)


@triton.jit
def scaled_with_sums(
    x_MD, scale_M, out_MD, sums_PD, M, D, programs, SCALED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out = scale * x in out's type, and the sums of its columns."""
    program = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(program * ROWS, M, programs * ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < M) & (columns[None, :] < D)
        offsets = rows[:, None].to(tl.int64) * D + columns[None, :]
        x = tl.load(x_MD + offsets, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            x *= tl.load(scale_M + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
        tl.store(out_MD + offsets, x.to(out_MD.dtype.element_ty), mask=inside)
        total += x
    tl.store(sums_PD + program * D + columns, tl.sum(total, axis=0), mask=columns < D)


@triton.jit
def gelu_backward(h_MI, d_MI, gelu_MI, sums_PI, M, D, programs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """GELU of h again; d, its output's gradient, becomes that of h; and the sums of the columns of the new d."""
    program = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(program * ROWS, M, programs * ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < M) & (columns[None, :] < D)
        offsets = rows[:, None].to(tl.int64) * D + columns[None, :]
        h = tl.load(h_MI + offsets, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(d_MI + offsets, mask=inside, other=0.0).to(tl.float32)
        below = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * h * h)
        tl.store(gelu_MI + offsets, (h * below).to(gelu_MI.dtype.element_ty), mask=inside)
        d *= below + h * density
        tl.store(d_MI + offsets, d.to(d_MI.dtype.element_ty), mask=inside)
        total += d
    tl.store(sums_PI + program * D + columns, tl.sum(total, axis=0), mask=columns < D)


@triton.jit
def pack_with_sums(q_MD, k_MD, v_MD, out_M3D, sums_P3D, M, D, programs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """q, k and v side by side, and the sums of their columns."""
    program = tl.program_id(0)
    which = tl.program_id(2)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    source = q_MD
    if which == 1:
        source = k_MD
    if which == 2:
        source = v_MD
    for start in range(program * ROWS, M, programs * ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < M) & (columns[None, :] < D)
        offsets = rows[:, None].to(tl.int64) * D + columns[None, :]
        x = tl.load(source + offsets, mask=inside, other=0.0)
        packed_offsets = rows[:, None].to(tl.int64) * (3 * D) + (which * D + columns)[None, :]
        tl.store(out_M3D + packed_offsets, x, mask=inside)
        total += x.to(tl.float32)
    own = sums_P3D + program * (3 * D) + which * D + columns
    tl.store(own, tl.sum(total, axis=0), mask=columns < D)
