"""A step whose loss or gradient is not finite on any rank moves nothing: how that is known, and what follows."""

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
    """A step whose loss or gradient is not finite; all ranks have the same."""

    step: int
    loss: float | None = None
    """Mean over ranks of the first micro-batch where it is not finite; None where gradients alone are not."""
    late: bool = False
    """Whether the step is over: its weights did not move, and its images are gone."""

    def __str__(self) -> str:
        what = "a gradient is not finite" if self.loss is None else f"the loss is {self.loss}"
        return f"{what} at step {self.step}"


class NonFinitePolicy:
    """What follows: here, the end of the run. `callbacks/nonfinite.py` has others."""

    continues = False
    """Whether the run goes on."""

    def on_nonfinite(self, trouble: NonFiniteStep) -> None:
        """Called on all ranks before weights move; raises `FloatingPointError` to end the run."""
        raise FloatingPointError(f"{trouble}: {ADVICE}.")

    def on_skipped(self, trouble: NonFiniteStep) -> None:
        """Called on all ranks when the step is over and has moved nothing."""


def first_nonfinite(readings: Iterable[StepMetrics]) -> NonFiniteStep | None:
    """The first loss that is not finite."""
    bad = (NonFiniteStep(reading.step, reading.loss) for reading in readings if not math.isfinite(reading.loss))
    return next(bad, None)


def zero_gradients_if(optimizer: Any, failed: Tensor) -> None:
    """Let `failed`, a flag on the device, keep this step's gradients from the weights; the program does not wait.

    PyTorch's fused optimizers leave out a step by themselves, as under fp16. Others take gradients of 0, and the
    weights move by what the optimizer has left from before.
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
    """Without a gradient no weight, moment or step count moves, whatever the optimizer."""
    for parameter in module.parameters():
        parameter.grad = None


class OverflowCounter:
    """Steps of `16-mixed` whose gradients left the range of fp16; the loss scale leaves them out by itself."""

    def __init__(self) -> None:
        self.count: Tensor | float = 0.0
        """So far; on the device after the first step."""

    def add(self, failed: Tensor) -> None:
        """Count a step, without waiting for its flag."""
        self.count = self.count + failed.float()

    def metrics(self, scaler: torch.amp.GradScaler) -> dict[str, Tensor | float]:
        """The metrics to log."""
        # `get_scale` would wait for the device, but for the first step.
        scale = scaler.get_scale() if scaler._scale is None else scaler._scale
        return {"amp/overflows": self.count, "amp/scale": scale}
