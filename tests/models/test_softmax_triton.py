"""The Triton kernels of the loss, compared with a loop over pairs of views in float64.

Without a GPU they run in Triton's interpreter, all cases in one process, and are compiled for a GPU.
"""

import importlib.util
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import run_program
from torch import Tensor

from dino_lightning.models.kernels.softmax_triton import available, loss_and_gradient_

TAU = {"student_temperature": 0.1, "teacher_temperature": 0.04}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ARITHMETIC = 4e-6
"""Relative error of a float32 softmax of logits up to 1: teacher - center is rounded by about 2^-24, and the division
by 0.04 makes 1.5e-6 of it; the exponential and the sums add a few 1e-7 each. It grows with the size of the logits."""

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half a unit in the last place of the dtype that the gradient is written in."""

INTERPRETED = ROUNDING | {torch.bfloat16: 2.0**-7}
"""The interpreter truncates bfloat16, a GPU rounds to nearest: a whole unit."""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@dataclass(frozen=True)
class Case:
    """A chunk of logits; `layout` is the memory layout of the student's rows, and `falling` rows decrease along K."""

    V: int
    T: int
    r: int
    K: int
    size: float = 1.0
    scale: float = 0.5
    layout: str = "plain"
    falling: bool = False


CASES = {
    "two views": Case(2, 2, 3, 100),
    "ten views": Case(10, 2, 2, 1000, scale=1 / 36),
    "whole blocks": Case(2, 2, 1, 8192),
    "several blocks and a rest": Case(3, 2, 2, 9001),
    "smaller than a warp": Case(4, 2, 2, 7),
    "one prototype": Case(2, 2, 2, 1),
    "one teacher view": Case(3, 1, 2, 65),
    "nothing to compare with": Case(1, 1, 2, 33),
    "three teacher views": Case(5, 3, 2, 130),
    "large logits": Case(4, 2, 2, 300, size=1e3),
    "large logits before small ones": Case(2, 2, 1, 9001, size=1e3, falling=True),
    "large scale": Case(3, 2, 2, 64, scale=4096.0),
    "slice of a buffer": Case(3, 2, 4, 200, layout="slice"),
    "images before views": Case(3, 2, 4, 200, layout="images first"),
}
HALF = ("two views", "several blocks and a rest", "large logits", "slice of a buffer", "nothing to compare with")
"""The cases that are also interpreted in half precision; a GPU runs all of them."""
KEYS = [(case, dtype) for case in CASES for dtype in DTYPES if dtype == "float32" or case in HALF]


def _chunk(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """Logits like the head's cosines, times `size`; `buffer` is the memory that `student` is a part of."""
    random = torch.Generator().manual_seed(case.V * case.K)
    V, T, r, K = case.V, case.T, case.r, case.K
    shape = {"plain": (V, r, K), "slice": (V, r + 3, K + 5), "images first": (r, V, K)}[case.layout]
    heights = torch.linspace(case.size, 0 if case.falling else case.size, shape[-1])

    def logits(*shape: int) -> Tensor:
        cosines = torch.rand(shape, generator=random) * 2 - 1
        return (cosines * heights[: shape[-1]]).to(dtype).to(device)

    buffer = logits(*shape)
    student = buffer.transpose(0, 1) if case.layout == "images first" else buffer[:, -r:, :K]
    teacher = logits(r, T, K).transpose(0, 1)
    center = (torch.randn(K, generator=random) * heights[:K] / 5).to(device)
    return {"buffer": buffer, "student": student, "teacher": teacher, "center": center, "scale": case.scale}


def _oracle(student: Tensor, teacher: Tensor, center: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (V, r), its derivative by s, and the sum of the distributions that the derivative is a difference of."""
    s = (student.double() / TAU["student_temperature"]).requires_grad_()
    loss, parts = torch.zeros_like(s[..., 0]), torch.zeros_like(s)
    for v in range(len(student)):
        for t in range(len(teacher)):
            if t == v:
                continue
            p = ((teacher[t].double() - center.double()) / TAU["teacher_temperature"]).softmax(-1)
            loss[v] = loss[v] - (p * s[v].log_softmax(-1)).sum(-1)
            parts[v] += p + s[v].detach().softmax(-1)
    gradient = torch.autograd.grad(loss.sum(), s)[0] if loss.requires_grad else torch.zeros_like(s)
    return loss.detach(), gradient, parts


def _assert_loss(ours: Tensor, expected: Tensor, *, size: float = 1.0) -> None:
    assert ours.dtype == torch.float32
    # A loss near 0 is the difference of terms of about 1, hence atol.
    torch.testing.assert_close(ours.double(), expected, rtol=ARITHMETIC * size, atol=1e-6)


def _assert_gradient(
    ours: Tensor, gradient: Tensor, parts: Tensor, *, scale: float = 1.0, size: float = 1.0, rounding=ROUNDING
) -> None:
    """Each entry to the arithmetic's error of its two parts and the rounding of its dtype.

    Entries far below the mean 1 / K have large exponents, hence large relative errors: they are held to the mean.
    The smallest step of float16 next to 0 is 2^-24.
    """
    bound = scale * (ARITHMETIC * size * (parts + 1 / parts.shape[-1]) + rounding[ours.dtype] * gradient.abs())
    if ours.dtype == torch.float16:
        bound = bound + 2.0**-25
    error = (ours.double() - scale * gradient).abs()
    assert (error <= bound).all(), f"{(error / bound).max()} times the bound"


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("softmax_triton")
    cases = {f"{case} {dtype}": _chunk(CASES[case], DTYPES[dtype]) for case, dtype in KEYS}
    cases["not a number"] = _chunk(CASES["two views"], torch.float32)
    cases["not a number"]["student"][1, 2, 3] = float("nan")
    torch.save(cases, folder / "cases")
    worker = Path(__file__).parents[1] / "helpers" / "softmax_triton_worker.py"
    ended = run_program(str(worker), str(folder / "cases"), str(folder / "results"), cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return torch.load(folder / "results")


@needs_triton
@pytest.mark.parametrize(("name", "dtype"), KEYS)
@pytest.mark.slow_after_first(3)
def test_kernels_equal_the_loop_over_pairs(interpreted: dict, name: str, dtype: str) -> None:
    case = CASES[name]
    chunk, done = _chunk(case, DTYPES[dtype]), interpreted[f"{name} {dtype}"]
    loss, gradient, parts = _oracle(chunk["student"], chunk["teacher"], chunk["center"])
    _assert_loss(done["loss"], loss, size=case.size)
    written = done["buffer"].as_strided(
        chunk["student"].shape, chunk["student"].stride(), chunk["student"].storage_offset()
    )
    _assert_gradient(written, gradient, parts, scale=case.scale, size=case.size, rounding=INTERPRETED)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_rows_are_written(interpreted: dict, dtype: str) -> None:
    chunk, done = _chunk(CASES["slice of a buffer"], DTYPES[dtype]), interpreted[f"slice of a buffer {dtype}"]
    before, after = chunk["buffer"], done["buffer"].clone()
    r, K = chunk["student"].shape[1:]
    assert not torch.equal(before, after)
    after[:, -r:, :K] = chunk["student"]
    assert torch.equal(before, after)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_view_without_another_crop_has_neither_loss_nor_gradient(interpreted: dict, dtype: str) -> None:
    done = interpreted[f"nothing to compare with {dtype}"]
    assert not done["loss"].any()
    assert not done["buffer"].any()


@needs_triton
def test_a_nan_affects_only_its_row(interpreted: dict) -> None:
    """The run stops at a loss that is not finite, so a maximum that ignores NaN must not hide one."""
    nan = interpreted["not a number"]["loss"].isnan()
    assert nan.nonzero().tolist() == [[1, 2]]


@needs_triton
@pytest.mark.parametrize("layout", ["views", "images"])
def test_rows_beyond_2_to_the_31(interpreted: dict, layout: str) -> None:
    far = interpreted[f"{layout} far apart"]
    loss, gradient, parts = _oracle(far["before"], far["teacher"], far["center"])
    _assert_loss(far["loss"], loss)
    _assert_gradient(far["after"], gradient, parts)


@needs_triton
def test_triton_is_imported_by_the_first_call_only(interpreted: dict) -> None:
    assert interpreted["imports_triton"] is False
    assert interpreted["has_triton_without"] is False


@needs_triton
@pytest.mark.parametrize("pointer", ["*fp32", "*bf16", "*fp16"])
@pytest.mark.slow_after_first(1)
def test_kernels_compile_for_a_gpu(pointer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter accepts Python that the compiler refuses. Compute capability 8.0; K = 65536, as in training."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dino_lightning.models.kernels.softmax_kernels import loss_and_gradient, teacher_statistics

    for kernel in (teacher_statistics, loss_and_gradient):
        constants = {"T": 2, "K": 65536, "BLOCK": 4096}
        kinds = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
        kinds |= {n: "fp32" for n in kinds if n.startswith(("inverse", "gradient"))}
        kinds |= {n: "*fp32" for n in kinds if n in ("center", "maximum_rT", "total_rT", "loss_rV")}
        kinds |= {n: pointer for n in kinds if n in ("student", "teacher")}
        # The launcher detects aligned addresses and strides.
        aligned = [n for n in kinds if kinds[n].startswith("*") or n.endswith("stride")]
        source = ASTSource(
            kernel,
            kinds,
            constexprs=constants,
            attrs={(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 16})
        assert "ld.global.v4" in compiled.asm["ptx"], "logits are read in vectors of 16 bytes"
    if pointer == "*bf16":
        assert "cvt.rn.bf16" in compiled.asm["ptx"], "gradients are rounded to nearest"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t, c: (s[..., :-1], t, c), "expected shapes"),
        (lambda s, t, c: (s, t[:, :1], c), "expected shapes"),
        (lambda s, t, c: (s, t, c[None]), "expected shapes"),
        (lambda s, t, c: (s.double(), t, c), "not torch.float64"),
        (lambda s, t, c: (s.mT.contiguous().mT, t, c), "contiguous along K"),
        (lambda s, t, c: (s, t, c.to("meta")), "one device"),
    ],
)
def test_inputs_that_the_kernels_cannot_read_are_refused(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_and_gradient_(*change(torch.zeros(3, 2, 8), torch.zeros(2, 2, 8), torch.zeros(8)), **TAU, gradient_scale=1)


def test_kernels_are_not_available_on_a_cpu() -> None:
    assert not available(torch.zeros(1))


# ------------------------------------------------------------------------------------------------------- on a GPU


@needs_triton
@needs_cuda
@pytest.mark.parametrize(("name", "dtype"), list(product(CASES, ("float32", "bfloat16"))))
def test_the_gpu_equals_the_loop_over_pairs(name: str, dtype: str) -> None:
    case = CASES[name]
    chunk = _chunk(case, DTYPES[dtype], "cuda")
    student, teacher, center = chunk["student"], chunk["teacher"], chunk["center"]
    loss, gradient, parts = _oracle(student, teacher, center)
    assert available(student)
    _assert_loss(loss_and_gradient_(student, teacher, center, **TAU, gradient_scale=case.scale), loss, size=case.size)
    _assert_gradient(student, gradient, parts, scale=case.scale, size=case.size)


@needs_triton
@needs_cuda
def test_kernels_do_not_wait_for_the_gpu() -> None:
    chunk = _chunk(CASES["ten views"], torch.bfloat16, "cuda")
    arguments = chunk["student"], chunk["teacher"], chunk["center"]
    loss_and_gradient_(*arguments, **TAU, gradient_scale=1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = loss_and_gradient_(*arguments, **TAU, gradient_scale=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite().all()
