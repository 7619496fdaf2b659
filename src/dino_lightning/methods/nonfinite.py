"""Steps whose loss or gradient is not finite on any rank: how they are detected, and what follows."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dino_lightning.methods.metrics_buffer import StepMetrics
from dino_lightning.runtime.sharding import is_sharded, local

ADVICE = "lower optim.lr or optim.clip_grad, lengthen optim.lr_warmup, or train with trainer.precision=bf16-mixed or 32"


@dataclass(frozen=True)
class NonFiniteStep:
    """A step whose loss or gradient is not finite, identical on all ranks."""

    step: int
    loss: float | None = None
    """The first loss (mean over ranks) that is not finite; None if only a gradient is not."""
    late: bool = False
    """Whether the step is already over: the weights did not change, and its images are no longer in memory."""

    def __str__(self) -> str:
        what = "a gradient is not finite" if self.loss is None else f"the loss is {self.loss}"
        return f"{what} at step {self.step}"


class NonFinitePolicy:
    """What happens after such a step: here, the run ends. `training/callbacks/nonfinite.py` has other policies."""

    continues = False
    """Whether the run continues."""

    def on_nonfinite(self, trouble: NonFiniteStep) -> None:
        """Called on all ranks before the weights change; raises `FloatingPointError` to end the run."""
        raise FloatingPointError(f"{trouble}: {ADVICE}.")

    def on_skipped(self, trouble: NonFiniteStep) -> None:
        """Called on all ranks after the step was skipped."""


def first_nonfinite(metrics: Iterable[StepMetrics]) -> NonFiniteStep | None:
    """The step of the first loss that is not finite; None if all are."""
    return next((NonFiniteStep(each.step, each.loss) for each in metrics if not math.isfinite(each.loss)), None)


def zero_gradients_if(optimizer: Any, failed: Tensor) -> None:
    """Discard this step's gradients if `failed`, a flag on the device, is set; the host does not wait for it.

    PyTorch's fused optimizers skip the step themselves, as under fp16. For others the gradients become 0, and the
    weights change only by the optimizer's momentum.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.found_inf = optimizer.grad_scale = None
    if optimizer.param_groups[0].get("fused") and not any(map(is_sharded, parameters)):
        optimizer.found_inf = failed.float()
        return
    for parameter in parameters:
        if parameter.grad is not None:
            local(parameter.grad).masked_fill_(failed, 0.0)


def drop_gradients(module: nn.Module) -> None:
    """Remove all gradients: no optimizer then changes a weight, a moment or a step count."""
    for parameter in module.parameters():
        parameter.grad = None


class OverflowCounter:
    """Counts the steps of `16-mixed` whose gradients overflowed fp16; the loss scaler skips them itself."""

    def __init__(self) -> None:
        self.count: Tensor | float = 0.0
        """Number so far; on the device after the first step."""

    def add(self, failed: Tensor) -> None:
        """Add a step's flag, without waiting for it."""
        self.count = self.count + failed.float()

    def metrics(self, scaler: torch.amp.GradScaler) -> dict[str, Tensor | float]:
        """The metrics to log."""
        # `get_scale` would wait for the device, except in the first step.
        scale = scaler.get_scale() if scaler._scale is None else scaler._scale
        return {"amp/overflows": self.count, "amp/scale": scale}
