"""Floating-point precision in one place."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precisions widened to float32; float32 and float64 as they are, so that `trainer.precision=64` means it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
