"""LARS: SGD with momentum for large batches (You et al., 2017)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dino_lightning.runtime.sharding import global_norms, is_sharded, local


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step on each matrix is scaled to the matrix's norm.

    One-dimensional parameters take SGD steps without weight decay. Each operation runs over all tensors of a group at
    once, and no value is read on the host.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, {**defaults, "trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            matrices = [parameter for parameter in trained if parameter.ndim > 1]
            vectors = [parameter for parameter in trained if parameter.ndim <= 1]
            if matrices:
                self._update(matrices, scaled_updates(matrices, group), group)
            if vectors:
                self._update(vectors, [local(_gradient(vector)) for vector in vectors], group)
        return loss

    def _update(self, parameters: list[nn.Parameter], updates: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        velocities = [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, updates)
        torch._foreach_add_([local(parameter) for parameter in parameters], velocities, alpha=-group["lr"])


def scaled_updates(matrices: list[nn.Parameter], group: dict[str, Any]) -> list[Tensor]:
    """Gradient plus weight decay, times trust coefficient * norm of the weight / norm of the update (equation 6).

    Under FSDP these are this rank's slices; the norms are those of the complete tensors.
    """
    weights = [local(matrix) for matrix in matrices]
    gradients = [local(_gradient(matrix)) for matrix in matrices]
    updates = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
    weight_norms, update_norms = global_norms([*weights, *updates], sharded=is_sharded(matrices[0])).chunk(2)
    trust = group["trust_coefficient"] * weight_norms / update_norms
    trust = trust.where((weight_norms > 0) & (update_norms > 0), 1.0)
    torch._foreach_mul_(updates, list(trust.unbind()))
    return updates


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
