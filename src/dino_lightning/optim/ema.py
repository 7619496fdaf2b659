"""The teacher as an exponential moving average of the student."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from dino_lightning.runtime.sharding import local

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def follow(teacher: ModuleT, student: ModuleT) -> ModuleT:
    """Load the student's weights and buffers into the teacher, and stop its gradients.

    The teacher is built separately instead of copied because it has no drop path.
    """
    if teacher is student:
        raise ValueError("student and teacher are the same object: the loss would fall to a trivial solution")
    teacher.load_state_dict(student.state_dict())
    return teacher.requires_grad_(False)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, *, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, over parameters (this rank's slices under FSDP).

    Buffers are not averaged: the batch-norm statistics of the teacher come from its own forward passes.

    Computed in one pass as teacher + (1 - momentum) * (student - teacher), which is more accurate than the sum of two
    products. At a momentum of 0.9999 the student's share is 0.0001; in float32 the two separately rounded factors miss
    a sum of 1 by up to 3e-8, so the teacher of a constant student would end 3e-8 / 0.0001, or 0.03 %, away from it.
    Here equal weights stay equal. In float32, no form can represent an update below half a unit in the teacher's last
    place: at such a momentum, a difference of less than about 0.03 % of the weight changes nothing.
    """
    averaged: list[Tensor] = [local(parameter) for parameter in teacher.parameters()]
    current: list[Tensor] = [local(parameter) for parameter in student.parameters()]
    torch._foreach_lerp_(averaged, current, 1 - momentum)
