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
"""Devices and dtypes for which PyTorch's fused optimizers exist and are tested here."""
MAX_EXPANDED = 1 << 14
"""Largest gradient (elements) whose factor is expanded to its shape, which needs next to no memory then."""


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups: with weight decay (scheduled by the caller) and without.

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
    """Clip each gradient to an L2 norm of `max_norm`, tensor by tensor and in place; 0 clips none.

    Unlike `clip_grad_norm_`, which computes one norm over all tensors. Returns a flag on the device, identical on all
    ranks, that tells whether any norm is not finite; None without gradients.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return None
    slices = [local(gradient) for gradient in gradients]
    norms = global_norms(slices, sharded=is_sharded(gradients[0]))  # all gradients are, or none
    if max_norm:
        # All gradients are multiplied, most of them by 1: skipping those would require the norms on the host.
        scale_each(slices, (max_norm / (norms + 1e-6)).clamp(max=1.0), fuse_small=slices[0].is_cuda)
    return ~torch.isfinite(norms).all()


def scale_each(tensors: list[Tensor], factors_N: Tensor, *, fuse_small: bool) -> None:
    """Multiply each of N tensors by its own factor, in place.

    With scalar factors a GPU launches one kernel per tensor: PyTorch fuses only equal shapes. With `fuse_small`, the
    factors of small tensors, mostly biases and norms, are expanded to their shapes, so that one kernel does all.
    """
    small = [n for n, x in enumerate(tensors) if fuse_small and x.numel() <= MAX_EXPANDED and x.is_contiguous()]
    if small:
        chosen = [tensors[n] for n in small]
        counts = [tensor.numel() for tensor in chosen]
        expanded = factors_N.index_select(0, _repeated(tuple(small), tuple(counts), factors_N.device)).split(counts)
        torch._foreach_mul_(chosen, [factor.view_as(tensor) for factor, tensor in zip(expanded, chosen, strict=True)])
    others = sorted(set(range(len(tensors))).difference(small))
    if others:
        factors = factors_N.unbind()
        torch._foreach_mul_([tensors[n] for n in others], [factors[n] for n in others])


@lru_cache(maxsize=4)  # with and without frozen prototypes
def _repeated(indices: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Each index repeated by its count, on the device."""
    repeated = torch.repeat_interleave(torch.tensor(indices), torch.tensor(counts))
    return repeated.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else repeated


def drop_last_layer_gradients(module: nn.Module) -> None:
    """Remove the gradients of the prototypes, so that no step, moment or weight decay affects them.

    A learning rate of 0 is not equivalent: Adam's moments and step count would still change.
    """
    for name, parameter in module.named_parameters():
        if "last_layer" in name:
            parameter.grad = None


def build_optimizer(config: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The configured optimizer over `groups`, whose parameters are already on their device.

    The schedules set learning rate and weight decay.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    match config:
        case AdamWConfig():
            betas, kernels = (config.betas[0], config.betas[1]), fastest_kernels(parameters)
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, **kernels)
        case SGDConfig():
            # PyTorch's fused SGD does not support sharded tensors.
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
    """Options of PyTorch's optimizers: fused kernels if they exist for these parameters, otherwise foreach."""
    fused = fused and all(p.device.type in FUSED_DEVICES and p.dtype in FUSED_DTYPES for p in parameters)
    return {"fused": fused, "foreach": not fused}


def _start_velocities(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Give parameters without a velocity a velocity of 0, which changes none of their steps.

    PyTorch's fused SGD fails if some parameters of a group have a velocity and others do not, such as prototypes at the
    end of their frozen epoch; and if the first step overflows under fp16, it keeps uninitialized memory as velocity.
    Frozen parameters get one, too: the gradients of this step do not exist yet.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _keep_kernels(kernels: dict[str, bool], _: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    # A checkpoint contains the kernels of the machine that wrote it.
    return {**state, "param_groups": [{**group, **kernels} for group in state["param_groups"]]}


def unscaling(closure: Callable[[], Any], *, optimizer: Any, precision: Any) -> Callable[[], Any]:
    """Wrap `closure`, the forward and backward pass, so that it also removes fp16's loss scale from the gradients.

    Lightning's `precision` plugin does this before it calls hooks, except for fused optimizers, which can unscale in
    their step: too late for clipping. The scaler remembers that gradients are unscaled and passes to the step only the
    flag on the device that tells whether a gradient overflowed, so that the step is skipped.
    """
    unwrapped = getattr(optimizer, "optimizer", optimizer)  # the scaler does not recognize Lightning's wrapper
    scaler = getattr(precision, "scaler", None)
    if scaler is None or not getattr(unwrapped, "_step_supports_amp_scaling", False):
        return closure

    def run() -> Any:
        result = closure()
        if result is not None:  # otherwise there was no backward pass
            scaler.unscale_(unwrapped)
        return result

    return run
