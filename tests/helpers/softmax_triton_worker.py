"""Runs the Triton kernels of the loss on the CPU: `softmax_triton_worker.py CASES RESULTS`, by `run_program`."""

import sys
from typing import Any

import torch
from triton_interpreter import use_interpreter

use_interpreter()

torch.set_num_threads(1)

TAU = {"student_temperature": 0.1, "teacher_temperature": 0.04}


FAR = {"views": ((3, 1, 100), (2**30, 128, 1)), "images": ((3, 3, 100), (128, 2**30, 1))}
"""Shapes and strides of rows that are 2^30 elements apart: the third row is beyond 2^31."""


def far_apart(layout: str) -> dict[str, torch.Tensor]:
    """Results for student and teacher rows that are far apart in a buffer, of which nothing else is accessed."""
    buffer = torch.empty(2**31 + 1024, dtype=torch.float16)
    student, teacher = (buffer.as_strided(*FAR[layout], offset) for offset in (0, 512))
    for rows in (student, teacher):
        rows.copy_(torch.rand(rows.shape) * 2 - 1)
    center = torch.randn(100) / 5
    before = {"before": student.clone(), "teacher": teacher.clone(), "center": center}
    loss = loss_and_gradient_(student, teacher, center, **TAU, gradient_scale=1.0)
    return before | {"after": student.clone(), "loss": loss}


def without_triton() -> bool:
    """The result of `has_triton` if Triton is not installed."""
    softmax_triton.has_triton.cache_clear()
    sys.modules["triton"] = None  # type: ignore[assignment]
    answer = softmax_triton.has_triton()
    del sys.modules["triton"]
    softmax_triton.has_triton.cache_clear()
    return answer


if __name__ == "__main__":
    before = "triton" in sys.modules
    from dino_lightning.models.kernels import softmax_triton
    from dino_lightning.models.kernels.softmax_triton import loss_and_gradient_

    results: dict[str, Any] = {"imports_triton": ("triton" in sys.modules) > before}
    results["has_triton_without"] = without_triton()
    for name, case in torch.load(sys.argv[1]).items():
        student, teacher, center = case["student"], case["teacher"], case["center"]
        loss = loss_and_gradient_(student, teacher, center, **TAU, gradient_scale=case["scale"])
        results[name] = {"loss": loss, "buffer": case["buffer"]}
    results |= {f"{layout} far apart": far_apart(layout) for layout in FAR}
    torch.save(results, sys.argv[2])
