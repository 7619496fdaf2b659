"""Transformer blocks with known weights; as a program, runs the fused block in Triton's interpreter.

`run_program` starts it with the path of the results.
"""

import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from triton_interpreter import use_interpreter

if __name__ == "__main__":
    use_interpreter()

from dino_lightning.models.kernels.block import fused_block
from dino_lightning.models.packed_block import PackedBlock, packed_pass

SHAPES = ((3, 17), (5, 5))
WIDTH, HEADS = 96, 3


def make_block(width: int, heads: int) -> PackedBlock:
    """A block whose weights all influence the output."""
    torch.manual_seed(0)
    block = PackedBlock(width, heads, qkv_bias=True)
    for name, parameter in block.named_parameters():
        mean, std = (1.0, 0.3) if "norm" in name and name.endswith("weight") else (0.0, 0.5)
        nn.init.normal_(parameter, mean=mean, std=width**-0.5 if parameter.ndim > 1 else std)
    return block


def outputs_and_gradients(
    block: PackedBlock, x_MD: Tensor, shapes: Any, scales_2M1: Tensor | None, *, fused: bool, half: bool
) -> dict[str, Tensor]:
    """The block's output and its gradients for input and weights, from the fused function or the reference."""
    x_MD = x_MD.clone().requires_grad_()
    block.zero_grad()
    with torch.autocast(x_MD.device.type, torch.bfloat16, enabled=half):
        if fused:
            first, second = (None, None) if scales_2M1 is None else scales_2M1.unbind(0)
            y_MD = fused_block(block, x_MD, shapes, (first, second))
        else:
            y_MD = packed_pass(block, x_MD, shapes, drop=scales_2M1)
    y_MD.backward(torch.linspace(-1, 1, y_MD.numel(), device=y_MD.device).cos().view_as(y_MD).to(y_MD.dtype))
    assert x_MD.grad is not None
    gradients = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    return {"y": y_MD.detach(), "x": x_MD.grad, **gradients}


def inputs(shapes: Any, width: int) -> tuple[Tensor, Tensor]:
    """Tokens (M, width) and drop path factors (2, M, 1), some of them 0."""
    M = sum(B * N for B, N in shapes)
    return torch.randn(M, width), (torch.rand(2, M, 1) < 0.7) / 0.7


def main(path: str) -> None:
    """Save the results of the fused function for each case."""
    torch.set_num_threads(1)
    torch.cuda.device_of = lambda _: nullcontext()  # type: ignore[assignment,misc]
    block, (x_MD, scales_2M1) = make_block(WIDTH, HEADS), inputs(SHAPES, WIDTH)
    results = {
        (half, dropped): outputs_and_gradients(
            block, x_MD, SHAPES, scales_2M1 if dropped else None, fused=True, half=half
        )
        for half, dropped in ((False, True), (True, False))
    }
    torch.save(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
