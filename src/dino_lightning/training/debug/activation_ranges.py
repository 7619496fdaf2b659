"""Ranges of a network's activations and gradients, to find where a value stops being finite."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@dataclass
class Range:
    """The range of the values of one or more tensors."""

    low: float = math.inf
    """The smallest finite value; inf if there is none."""
    high: float = -math.inf
    """The largest finite value; -inf if there is none."""
    count: int = 0
    bad: int = 0
    """Values that are not finite."""

    @property
    def share(self) -> float:
        """Share of values that are not finite (0 to 1)."""
        return self.bad / self.count if self.count else 0.0

    def add(self, tensor: Tensor) -> None:
        """Include the values of a tensor; this waits for the device."""
        values = tensor.detach().flatten()
        finite = values[values.isfinite()]
        self.count += len(values)
        self.bad += len(values) - len(finite)
        if len(finite):
            self.low, self.high = min(self.low, finite.min().item()), max(self.high, finite.max().item())


@dataclass
class ActivationRanges:
    """Ranges by name, in the order of computation; a module comes after its submodules."""

    by_name: dict[str, Range] = field(default_factory=dict)
    first: str | None = None
    """The first name with a value that is not finite."""

    def add(self, name: str, value: Any) -> None:
        """Add all floating-point tensors in `value`, a tensor or nested tuples, lists and dictionaries of tensors."""
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        for tensor in tensors:
            values = self.by_name.setdefault(name, Range())
            values.add(tensor)
            if values.bad and self.first is None:
                self.first = name


@contextmanager
def record_ranges(
    module: nn.Module, *, forward: ActivationRanges, backward: ActivationRanges | None = None
) -> Iterator[None]:
    """Within, the output of each submodule is added to `forward`; for a compiled submodule, only that of the whole.

    The gradient of each parameter is added to `backward` once complete, in the order of the backward pass.
    """

    def add_output(name: str, _: nn.Module, inputs: Any, output: Any) -> None:
        forward.add(name, output)

    def add_gradient(name: str, parameter: Tensor) -> None:
        assert backward is not None
        backward.add(name, parameter.grad)

    with ExitStack() as hooks:
        for name, part in module.named_modules():
            if part is not module:
                hooks.enter_context(part.register_forward_hook(partial(add_output, name)))
        for name, parameter in module.named_parameters() if backward is not None else ():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(partial(add_gradient, name))
                hooks.callback(hook.remove)
        yield


def first_nonfinite_tensor(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is not finite; None if all values are finite."""
    floats = ((name, tensor) for name, tensor in tensors.items() if tensor.is_floating_point())
    return next((name for name, tensor in floats if not torch.isfinite(tensor).all()), None)
