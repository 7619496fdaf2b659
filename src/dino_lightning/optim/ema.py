"""The teacher as exponential moving average of the student."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from dino_lightning.runtime.sharding import local

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def follow(teacher: ModuleT, student: ModuleT) -> ModuleT:
    """Give the teacher, a network of its own, the student's weights and buffers; it takes no gradient from then on.

    It is not a copy because the two are built differently: the teacher has no drop path.
    """
    if teacher is student:
        raise ValueError("student and teacher are the same object: the loss would fall to a trivial solution")
    teacher.load_state_dict(student.state_dict())
    return teacher.requires_grad_(False)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, *, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, over parameters (this rank's slices under FSDP).

    Buffers are left alone: the batch-norm statistics of the teacher come from its own forward passes.

    Computed in one pass as teacher + (1 - momentum) * (student - teacher), which also rounds better than the sum of
    two products. At a momentum of 0.9999 the student's share is 0.0001, and in float32 the two factors, rounded each by
    itself, miss a sum of 1 by up to 3e-8: the teacher would settle 3e-8 / 0.0001, or 0.03 %, away from a student that
    stands still. Here equal weights stay equal, and only the final sum is rounded at the teacher's size. What no form
    in float32 keeps is a step below half a unit in the teacher's last place: where they differ by less than about
    0.03 % of the weight, such a momentum moves nothing.
    """
    averaged: list[Tensor] = [local(parameter) for parameter in teacher.parameters()]
    current: list[Tensor] = [local(parameter) for parameter in student.parameters()]
    torch._foreach_lerp_(averaged, current, 1 - momentum)
