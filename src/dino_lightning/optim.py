"""Parameter groups, per-tensor clipping, the frozen last layer, and the optimizers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dino_lightning.config import AdamWConfig, LARSConfig, OptimConfig, SGDConfig
from dino_lightning.distributed import all_reduce_sum
from dino_lightning.numerics import at_least_float32
from dino_lightning.sharding import is_sharded, local


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups: decayed (scheduled by the caller) and not (0 for good).

    Only biases and one-dimensional parameters are exempt from weight decay, as in the original: the class token, the
    position embedding and the norms of the prototypes, of shape (K, 1), are decayed.
    """
    decayed, exempt = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (exempt if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]


@torch.no_grad()
def clip_each_gradient(parameters: Iterable[nn.Parameter], *, max_norm: float) -> None:
    """Scale each gradient whose L2 norm exceeds `max_norm` down to it, tensor by tensor and in place.

    This is not `clip_grad_norm_`, which measures one norm over all tensors.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    slices = [local(gradient) for gradient in gradients]
    norms = torch.stack(torch._foreach_norm(slices, 2))
    if is_sharded(gradients[0]):  # then all are
        norms = all_reduce_sum(at_least_float32(norms).square()).sqrt()
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(slices, list(factors.unbind()))


def drop_last_layer_gradients(module: nn.Module) -> None:
    """Forget the gradients of the prototypes, so that no step, moment or weight decay reaches them.

    A learning rate of 0 is not the same: Adam's moments and step count would go on.
    """
    for name, parameter in module.named_parameters():
        if "last_layer" in name:
            parameter.grad = None


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step on each matrix is scaled to the matrix's norm (You et al., 2017).

    One-dimensional parameters take plain SGD steps without weight decay.
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
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust_coefficient": trust_coefficient},
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)
        return loss

    def _step_one(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        update: Tensor = parameter.grad  # type: ignore[assignment]
        if parameter.ndim > 1:
            update = update.add(parameter, alpha=group["weight_decay"])
            weight_norm, update_norm = parameter.norm(), update.norm()
            trust = group["trust_coefficient"] * weight_norm / update_norm
            update = update * torch.where((weight_norm > 0) & (update_norm > 0), trust, torch.ones_like(trust))
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["momentum_buffer"].mul_(group["momentum"]).add_(update)
        parameter.add_(state["momentum_buffer"], alpha=-group["lr"])


def build_optimizer(config: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The configured optimizer over `groups`; learning rate and weight decay are written by the schedules."""
    match config:
        case AdamWConfig():
            beta1, beta2 = config.betas
            return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2))
        case SGDConfig():
            return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum)
        case LARSConfig():
            return LARS(groups, momentum=config.momentum, trust_coefficient=config.trust_coefficient)
        case _:
            raise TypeError(f"no optimizer for {type(config).__name__}")
