"""Parameter groups, per-tensor clipping, the frozen last layer, and the optimizers."""

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from dino_lightning.config import AdamWConfig, LARSConfig, OptimConfig, SGDConfig
from dino_lightning.optim.lars import LARS
from dino_lightning.runtime.sharding import global_norms, is_sharded, local

FUSED_DEVICES, FUSED_DTYPES = ("cpu", "cuda"), (torch.float32, torch.float64)
"""Where PyTorch's fused optimizers run and are tested here."""
SMALL = 1 << 14
"""Numbers of a gradient up to which its factor is spread over it, which takes next to no memory then."""


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
def clip_each_gradient(parameters: Iterable[nn.Parameter], *, max_norm: float) -> Tensor | None:
    """Scale each gradient whose L2 norm exceeds `max_norm` down to it, tensor by tensor and in place; 0 scales none.

    This is not `clip_grad_norm_`, which measures one norm over all tensors. Returns whether a norm is not finite, a
    flag on the device that is the same on all ranks; None where there are no gradients.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return None
    slices = [local(gradient) for gradient in gradients]
    norms = global_norms(slices, sharded=is_sharded(gradients[0]))  # all gradients are, or none
    if max_norm:
        # All of them are multiplied, most by 1: to pass over those would mean to wait for the norms on the host.
        scale_each(slices, (max_norm / (norms + 1e-6)).clamp(max=1.0), join=slices[0].is_cuda)
    return ~torch.isfinite(norms).all()


def scale_each(tensors: list[Tensor], factors_N: Tensor, *, join: bool) -> None:
    """Multiply each of N tensors by its own factor, in place.

    By single factors a GPU takes a kernel for each tensor: PyTorch joins only lists of equal shapes. With `join` the
    small tensors, most of them biases and norms, get their factors in their own shapes, and so take one kernel for all.
    """
    small = [n for n, tensor in enumerate(tensors) if join and tensor.numel() <= SMALL and tensor.is_contiguous()]
    if small:
        chosen = [tensors[n] for n in small]
        place = _places(tuple(small), tuple(tensor.numel() for tensor in chosen), factors_N.device)
        spread = factors_N.index_select(0, place).split([tensor.numel() for tensor in chosen])
        own = [factor.view_as(tensor) for factor, tensor in zip(spread, chosen, strict=True)]
        torch._foreach_mul_(chosen, own)
    others = sorted(set(range(len(tensors))).difference(small))
    if others:
        factors = factors_N.unbind()
        torch._foreach_mul_([tensors[n] for n in others], [factors[n] for n in others])


@lru_cache(maxsize=4)  # with and without frozen prototypes
def _places(indices: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Each index as often as its count, on the device."""
    places = torch.repeat_interleave(torch.tensor(indices), torch.tensor(counts))
    return places.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else places


def drop_last_layer_gradients(module: nn.Module) -> None:
    """Forget the gradients of the prototypes, so that no step, moment or weight decay reaches them.

    A learning rate of 0 is not the same: Adam's moments and step count would go on.
    """
    for name, parameter in module.named_parameters():
        if "last_layer" in name:
            parameter.grad = None


def build_optimizer(config: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The configured optimizer over `groups`, which are on their device already.

    Learning rate and weight decay are written by the schedules.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    match config:
        case AdamWConfig():
            beta1, beta2 = config.betas
            kernels = fastest_kernels(parameters)
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), **kernels)
        case SGDConfig():
            # PyTorch's fused SGD does not know slices.
            kernels = fastest_kernels(parameters, fused=not any(map(is_sharded, parameters)))
            optimizer = torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, **kernels)
            optimizer.register_step_pre_hook(_start_velocities)
        case LARSConfig():
            return LARS(groups, momentum=config.momentum, trust_coefficient=config.trust_coefficient)
        case _:
            raise TypeError(f"no optimizer for {type(config).__name__}")
    optimizer.register_load_state_dict_pre_hook(partial(_keep_kernels, kernels))
    return optimizer


def fastest_kernels(parameters: list[nn.Parameter], *, fused: bool = True) -> dict[str, bool]:
    """Options of PyTorch's optimizers: one pass over weights, gradients and moments where that exists here."""
    fused = fused and all(p.device.type in FUSED_DEVICES and p.dtype in FUSED_DTYPES for p in parameters)
    return {"fused": fused, "foreach": not fused}


def _start_velocities(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Give parameters that have not moved yet a velocity of 0, which changes no step of theirs.

    Left to itself, PyTorch's fused SGD fails where some parameters of a group have a velocity and others do not, as
    prototypes at the end of their frozen epoch; and where the first step overflows under fp16, it keeps uninitialized
    memory as velocity. Also those that stay frozen get one: here the gradients of this step are still to come.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _keep_kernels(kernels: dict[str, bool], _: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    # A checkpoint names the kernels of the machine that wrote it.
    return {**state, "param_groups": [{**group, **kernels} for group in state["param_groups"]]}


def unscaling(closure: Callable[[], Any], *, optimizer: Any, precision: Any) -> Callable[[], Any]:
    """`closure`, the forward and backward pass, and after it gradients free of fp16's loss scale.

    Lightning's `precision` plugin does so itself before it calls hooks, except for fused optimizers, which could
    unscale in their step: too late for clipping. The scaler remembers that it is done, and hands the step only what the
    device knows and the host need not: whether a gradient overflowed, so that nothing may move.
    """
    own = getattr(optimizer, "optimizer", optimizer)  # not Lightning's wrapper, which the scaler would not recognize
    scaler = getattr(precision, "scaler", None)
    if scaler is None or not getattr(own, "_step_supports_amp_scaling", False):
        return closure

    def run() -> Any:
        result = closure()
        if result is not None:  # else there was no backward pass
            scaler.unscale_(own)
        return result

    return run
