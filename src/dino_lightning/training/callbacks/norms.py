"""Lengths of the gradient and of the weights: `norm/gradient`, `norm/student`, `norm/teacher`."""

from collections.abc import Iterable
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from dino_lightning.methods.base import Method
from dino_lightning.methods.student_teacher import StudentTeacher
from dino_lightning.runtime.precision import at_least_float32
from dino_lightning.runtime.sharding import global_norms, is_sharded, local

GRADIENT = "norm/gradient"


class Norms(L.Callback):
    """Logs, in logging steps, L2 norms over all tensors together.

    `norm/student` and `norm/teacher` are of the weights with which the step begins. `norm/gradient` is of the step
    before: over ranks and micro-batches, free of fp16's loss scale, before it is clipped. The gradient of a step comes
    after its loss has been sent off, and to ask for it would make the program wait; so it travels with the next loss.
    """

    def __init__(self) -> None:
        self._gradient: Tensor | None = None
        """Of the step before, on the device, where the next one is logged."""
        self._step = -1
        self._carried: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring what a checkpoint has back to the device."""
        self._step = -1
        if self._gradient is not None:
            self._gradient = self._gradient.to(pl_module.device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Send the norms with the loss of this micro-batch; the last of its step has the row."""
        method = cast(Method, pl_module)
        if not method.is_logging_step:
            return
        if self._step != trainer.global_step:
            self._step, self._carried = trainer.global_step, weight_norms(method)
            if self._gradient is not None:
                self._carried[GRADIENT] = self._gradient
            self._gradient = None
        for name, value in self._carried.items():
            method.metrics.record_for_next(name, value)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Measure the gradient where the next step is logged; Lightning has unscaled it and not yet clipped it."""
        if (trainer.global_step + 2) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            gradients = (weight.grad for weight in pl_module.parameters() if weight.grad is not None)
            self._gradient = norm_of_all(gradients)

    def state_dict(self) -> dict[str, Any]:
        """The norm on its way, so that a run that goes on has the rows of one that was never interrupted."""
        return {"gradient": None if self._gradient is None else self._gradient.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it over."""
        self._gradient = state_dict["gradient"]


def weight_norms(method: Method) -> dict[str, Tensor]:
    """Norms of all weights of each network, head included."""
    norms = {"norm/student": norm_of_all(method.student.parameters())}
    if isinstance(method, StudentTeacher):
        norms["norm/teacher"] = norm_of_all(method.teacher.parameters())
    return {name: norm for name, norm in norms.items() if norm is not None}


@torch.no_grad()
def norm_of_all(tensors: Iterable[Tensor]) -> Tensor | None:
    """The L2 norm over all tensors together, a scalar on their device, whole where ranks have slices; None for none.

    With slices, all ranks call it together.
    """
    found = list(tensors)
    if not found:
        return None
    norms_N = global_norms([local(tensor) for tensor in found], sharded=is_sharded(found[0]))
    return torch.linalg.vector_norm(at_least_float32(norms_N))
