"""The Triton kernels of `softmax_triton`, in a separate file because it imports triton, which is not always installed.

A program is one row. Rows are numbered image by image, so that the views of an image run side by side and find its
teacher rows in the L2 cache. Offsets of rows are 64-bit: V * r * K passes 2^31 within a batch; K does not. K is
a constant of the compiled kernel, which then needs no masks where blocks divide it.
"""

import triton
import triton.language as tl


@triton.jit
def _row(base, program, views, view_stride, image_stride):
    """Pointer to the row of a program, and the number of its view."""
    view = program % views
    image = program // views
    return base + view.to(tl.int64) * view_stride + image.to(tl.int64) * image_stride, view


@triton.jit
def _add_exponentials(maximum, total, x, inverse_temperature):
    """One block of the online softmax: the running maximum of x, and sums of exp((x - maximum) / temperature).

    The sums stay one per lane: a block costs one reduction, and the rounding errors of long rows stay small. The
    maximum is taken of x before the division: the difference of two near logits is exact, of two quotients it is not.
    """
    larger = tl.maximum(maximum, tl.max(x, axis=0))
    total = total * tl.exp((maximum - larger) * inverse_temperature)
    return larger, total + tl.exp((x - larger) * inverse_temperature)


@triton.jit
def teacher_statistics(
    teacher,
    center,
    maximum_rT,
    total_rT,
    inverse_temperature,
    view_stride,
    image_stride,
    T: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """max_k (teacher - center) of a row and sum_k exp((teacher - center - max) / temperature), in one pass."""
    program = tl.program_id(0)
    row, _ = _row(teacher, program, T, view_stride, image_stride)
    maximum = -float("inf")
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < K
        x = tl.load(row + column, mask=inside, other=-float("inf")).to(tl.float32)
        x -= tl.load(center + column, mask=inside, other=0.0).to(tl.float32)
        maximum, total = _add_exponentials(maximum, total, x, inverse_temperature)
    tl.store(maximum_rT + program, maximum)
    tl.store(total_rT + program, tl.sum(total, axis=0))


@triton.jit
def _target(
    teacher,
    center,
    maximum_T,
    total_T,
    column,
    inside,
    view,
    inverse_temperature,
    stride,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of q_v: the teacher's distributions of an image, without that of the view's own crop."""
    c = tl.load(center + column, mask=inside, other=0.0).to(tl.float32)
    target = tl.zeros([BLOCK], tl.float32)
    for t in tl.static_range(T):  # pyright: ignore[reportGeneralTypeIssues]
        x = tl.load(teacher + column, mask=inside & (view != t), other=-float("inf")).to(tl.float32)
        distance = (x - c - tl.load(maximum_T + t)) * inverse_temperature
        target += tl.exp(distance) * (1.0 / tl.load(total_T + t))
        teacher += stride
    return target


@triton.jit
def loss_and_gradient(
    student,
    teacher,
    center,
    maximum_rT,
    total_rT,
    loss_rV,
    inverse_student,
    inverse_teacher,
    gradient_scale,
    V,
    student_view_stride,
    student_image_stride,
    teacher_view_stride,
    teacher_image_stride,
    T: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Two passes over a row of the student: its softmax's maximum and sum; then gradient and <q, s>."""
    program = tl.program_id(0)
    row, view = _row(student, program, V, student_view_stride, student_image_stride)
    image = (program // V).to(tl.int64)
    teacher += image * teacher_image_stride
    weight = tl.where(view < T, T - 1, T).to(tl.float32)

    maximum = -float("inf")
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(row + column, mask=column < K, other=-float("inf")).to(tl.float32)
        maximum, total = _add_exponentials(maximum, total, x, inverse_student)
    total_exp = tl.sum(total, axis=0)
    weight_of_exp = weight / total_exp

    inner = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < K
        x = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
        distance = (x - maximum) * inverse_student
        target = _target(
            teacher,
            center,
            maximum_rT + image * T,
            total_rT + image * T,
            column,
            inside,
            view,
            inverse_teacher,
            teacher_view_stride,
            T,
            BLOCK,
        )
        inner += target * distance
        gradient = gradient_scale * (weight_of_exp * tl.exp(distance) - target)
        tl.store(row + column, gradient.to(student.dtype.element_ty), mask=inside)
    # w * (max + log total) - <q, s> with the two terms in the maximum cancelled, because q sums to w.
    tl.store(loss_rV + program, weight * tl.log(total_exp) - tl.sum(inner, axis=0))
