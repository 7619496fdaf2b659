"""L2 norms of the gradient and of the weights: `norm/gradient`, `norm/student`, `norm/teacher`."""

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from dino_lightning.methods.base import Method
from dino_lightning.methods.student_teacher import StudentTeacher
from dino_lightning.runtime.precision import at_least_float32
from dino_lightning.runtime.sharding import global_norms, is_sharded, local

GRADIENT = "norm/gradient"


class Norms(L.Callback):
    """Logs L2 norms over all tensors together, in logging steps.

    `norm/student` and `norm/teacher` are the norms of the weights at the start of the step. `norm/gradient` belongs to
    the previous step: averaged over ranks and micro-batches, without fp16's loss scale, before clipping. The gradient
    is complete only after the step's loss was sent to the host, and reading it then would wait for the device, so its
    norm is sent with the next loss.
    """

    def __init__(self) -> None:
        self._gradient_norm: Tensor | None = None
        """Of the previous step, on the device; None unless the current step is logged."""
        self._step = -1
        self._norms: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move the norm that a checkpoint contained to the device."""
        self._step = -1
        if self._gradient_norm is not None:
            self._gradient_norm = self._gradient_norm.to(pl_module.device)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Send the norms with the loss of this micro-batch; the row of a step is that of its last one."""
        if not pl_module.is_logging_step:
            return
        if self._step != trainer.global_step:
            self._step, self._norms = trainer.global_step, weight_norms(pl_module)
            if self._gradient_norm is not None:
                self._norms[GRADIENT] = self._gradient_norm
            self._gradient_norm = None
        for name, value in self._norms.items():
            pl_module.metrics.record_for_next(name, value)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Compute the gradient's norm if the next step is logged; Lightning has unscaled but not yet clipped it."""
        if (trainer.global_step + 2) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            gradients = (weight.grad for weight in pl_module.parameters() if weight.grad is not None)
            self._gradient_norm = total_norm(gradients)

    def state_dict(self) -> dict[str, Any]:
        """The norm that is not logged yet, so that a resumed run logs the same rows as an uninterrupted one."""
        return {"gradient": None if self._gradient_norm is None else self._gradient_norm.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the norm."""
        self._gradient_norm = state_dict["gradient"]


def weight_norms(method: Method) -> dict[str, Tensor]:
    """The norm over all weights of each network, including its head."""
    norms = {"norm/student": total_norm(method.student.parameters())}
    if isinstance(method, StudentTeacher):
        norms["norm/teacher"] = total_norm(method.teacher.parameters())
    return {name: norm for name, norm in norms.items() if norm is not None}


@torch.no_grad()
def total_norm(tensors: Iterable[Tensor]) -> Tensor | None:
    """The L2 norm over all tensors together, a scalar on their device; None without tensors.

    For sharded tensors it is the norm over all ranks, which call it together.
    """
    tensors = list(tensors)
    if not tensors:
        return None
    norms_N = global_norms([local(tensor) for tensor in tensors], sharded=is_sharded(tensors[0]))
    return torch.linalg.vector_norm(at_least_float32(norms_N))
