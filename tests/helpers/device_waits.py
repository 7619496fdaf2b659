"""What would make a program wait for its device, seen on the CPU."""

import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

OPERATIONS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "lift_fresh"}
"""`item`, `bool` and `float`; sizes that depend on values; `torch.tensor(number)`, on a GPU a copy that waits."""
METHODS = {"tolist", "numpy", "cpu", "__array__"}
"""Copies to the host, which on the CPU are no operation."""


class Operations(TorchDispatchMode):
    """What reaches PyTorch's kernels, also from within its own code."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masked = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in OPERATIONS or masked:
            self.seen.append(f"{name}: {' < '.join(callers())}")
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """What Python calls on tensors. Readings may copy to the host: theirs is there already."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") in METHODS and "/metrics_buffer.py:" not in callers()[0]:
            self.seen.append(f"{func.__name__}: {' < '.join(callers())}")
        return func(*args, **(kwargs or {}))


def callers() -> list[str]:
    stack = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[:-2]]
    return stack[::-1][:12]


@contextmanager
def waits() -> Iterator[list[str]]:
    """All within that would make the program wait for a device, and who did it."""
    seen: list[str] = []
    with Methods(seen), Operations(seen):
        yield seen


class Watch(Callback):
    """Watches everything between the starts of two micro-batches, loops and loggers of Lightning included."""

    def __init__(self, watched: AbstractContextManager[Any], *, first: int, last: int) -> None:
        self.watched, self.first, self.last = watched, first, last
        self.seen: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.seen = self.watched.__enter__()
        elif batch_idx == self.last:
            self.watched.__exit__(None, None, None)
