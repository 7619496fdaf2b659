"""Detects operations that would make the host wait for a GPU; works on the CPU."""

import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITING_OPERATIONS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
    "lift_fresh",
}
"""`item`, `bool` and `float`; sizes that depend on values; `torch.tensor(number)`, a blocking copy on a GPU."""
WAITING_METHODS = {"tolist", "numpy", "cpu", "__array__"}
"""Copies to the host, which on the CPU are not operations."""


class OperationRecorder(TorchDispatchMode):
    """Records waiting operations, including those that PyTorch itself calls."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masked = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITING_OPERATIONS or masked:
            self.calls.append(f"{name}: {' < '.join(callers())}")
        return func(*args, **(kwargs or {}))


class MethodRecorder(TorchFunctionMode):
    """Records waiting methods of tensors. The metrics buffer may call them: its values are already on the host."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") in WAITING_METHODS and "/metrics_buffer.py:" not in callers()[0]:
            self.calls.append(f"{func.__name__}: {' < '.join(callers())}")
        return func(*args, **(kwargs or {}))


def callers() -> list[str]:
    stack = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[:-2]]
    return stack[::-1][:12]


@contextmanager
def waits() -> Iterator[list[str]]:
    """Yields a list that collects the waiting operations inside the `with` block and their callers."""
    calls: list[str] = []
    with MethodRecorder(calls), OperationRecorder(calls):
        yield calls


class EnterBetweenBatches(Callback):
    """Enters a context manager from the start of one micro-batch to the start of another.

    This includes Lightning's loops and loggers. `result` is the value of the `with` statement.
    """

    def __init__(self, context: AbstractContextManager[Any], *, first: int, last: int) -> None:
        self.context, self.first, self.last = context, first, last
        self.result: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.result = self.context.__enter__()
        elif batch_idx == self.last:
            self.context.__exit__(None, None, None)
