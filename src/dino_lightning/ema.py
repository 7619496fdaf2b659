"""The teacher as exponential moving average of the student."""

from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def follow(teacher: Network, student: Network) -> Network:
    """Give the teacher, a network of its own, the student's weights and buffers; it takes no gradient from then on.

    It is not a copy because the two are built differently: the teacher has no drop path.
    """
    if teacher is student:
        raise ValueError("student and teacher are the same object: the loss would fall to a trivial solution")
    teacher.load_state_dict(student.state_dict())
    return teacher.requires_grad_(False)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, *, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, over parameters.

    Buffers are left alone: the batch-norm statistics of the teacher come from its own forward passes.
    """
    averaged: list[Tensor] = list(teacher.parameters())
    current: list[Tensor] = list(student.parameters())
    torch._foreach_mul_(averaged, momentum)
    torch._foreach_add_(averaged, current, alpha=1 - momentum)
