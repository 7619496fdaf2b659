"""Ranges of what flows through a network: where a value that is not finite comes from."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@dataclass
class Range:
    """Of the values of one or more tensors."""

    low: float = math.inf
    """The smallest finite value; inf where there is none."""
    high: float = -math.inf
    """The largest finite value; -inf where there is none."""
    count: int = 0
    bad: int = 0
    """Values that are not finite."""

    @property
    def share(self) -> float:
        """Of values that are not finite."""
        return self.bad / self.count if self.count else 0.0

    def add(self, tensor: Tensor) -> None:
        """Widen the range; the program waits for the values."""
        values = tensor.detach().flatten()
        finite = values[values.isfinite()]
        self.count += len(values)
        self.bad += len(values) - len(finite)
        if len(finite):
            self.low, self.high = min(self.low, finite.min().item()), max(self.high, finite.max().item())


@dataclass
class ActivationRanges:
    """By name, in the order in which the values came to be; a module comes after its parts."""

    by_name: dict[str, Range] = field(default_factory=dict)
    first: str | None = None
    """Where a value was not finite before all others."""

    def add(self, name: str, value: Any) -> None:
        """Add all floating-point tensors in `value`, a tensor or a nest of tuples, lists and dictionaries."""
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        for tensor in tensors:
            known = self.by_name.setdefault(name, Range())
            before = known.bad
            known.add(tensor)
            if known.bad > before and self.first is None:
                self.first = name

    def plain(self) -> dict[str, dict[str, float]]:
        """Plain types."""
        return {name: asdict(values) for name, values in self.by_name.items()}


@contextmanager
def record_ranges(module: nn.Module, *, into: ActivationRanges) -> Iterator[None]:
    """Within, what each module below `module` returns is added, also what a compiled one does as a whole."""

    def see(name: str, _: nn.Module, inputs: Any, output: Any) -> None:
        into.add(name, output)

    handles = [
        part.register_forward_hook(partial(see, name)) for name, part in module.named_modules() if part is not module
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched_gradients(module: nn.Module, *, into: ActivationRanges) -> Iterator[None]:
    """Within, each gradient of a parameter is added when it is complete, in the order of the backward pass."""

    def see(name: str, parameter: Tensor) -> None:
        into.add(name, parameter.grad)

    handles = [
        parameter.register_post_accumulate_grad_hook(partial(see, name))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is not finite."""
    floats = ((name, tensor) for name, tensor in tensors.items() if tensor.is_floating_point())
    return next((name for name, tensor in floats if not torch.isfinite(tensor).all()), None)
