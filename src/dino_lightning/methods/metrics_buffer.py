"""Copies the metrics of a step to the host asynchronously, without stalling the device.

A program that reads a loss with `loss.item()` waits until the device has finished its queue, and then the device waits
until the program has filled it again. Here a micro-batch only starts the copy of its metrics. The host waits for them
once the backward pass is in the device's queue and before the weights change: even then the device has work to do. So
all ranks know within the same step whether the loss of any rank is not finite, and whether any rank was asked to stop
or to save. Loggers and callbacks get the metrics later, when the next step begins.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor

from dino_lightning.runtime.collectives import all_reduce_sum_later, world_size
from dino_lightning.runtime.precision import at_least_float32

SUMMED = 4
"""Count of the numbers that are summed over ranks with each micro-batch: the loss and three flags."""


@dataclass
class StepMetrics:
    """The metrics of one micro-batch."""

    step: int
    """Index of the optimizer step it belongs to."""
    epoch: int
    images: int
    """Images on this rank, the weight of the loss in the epoch's mean."""
    logged: bool
    """Whether metrics besides the loss are recorded."""
    loss: float = float("nan")
    """Mean over ranks. It, `local_loss` and device scalars in `values` are known once `has_arrived`."""
    local_loss: float = float("nan")
    """The loss of this rank."""
    is_last_micro_batch: bool = False
    """Whether it is the last micro-batch of its optimizer step."""
    skipped: bool = False
    """Whether its step is skipped; it then counts for no mean."""
    values: dict[str, float] = field(default_factory=dict)
    from_previous_step: set[str] = field(default_factory=set)
    """Names of values that were measured before this micro-batch began."""
    _scalars: dict[str, Tensor] = field(default_factory=dict)
    _receive: Callable[[], list[float]] | None = None

    @property
    def has_arrived(self) -> bool:
        """Whether all values are on the host."""
        return self._receive is None

    def record(self, name: str, value: Tensor | float) -> None:
        """Record a metric; a tensor must be a scalar and be recorded before `start_reduce`."""
        if not self.logged:
            return
        if isinstance(value, Tensor):
            assert self._receive is None, f"{name}: record device scalars before `start_reduce`"
            self._scalars[name] = value.detach()
        else:
            self.values[name] = value

    def row(self) -> dict[str, float]:
        """The row to log; for a skipped step, only finite values."""
        row = {**self.values, "epoch": self.epoch}
        # A gradient norm that is not finite belongs to a skipped step, or to an overflow of fp16.
        may_be_nonfinite = row if self.skipped else self.from_previous_step
        row = {name: value for name, value in row.items() if name not in may_be_nonfinite or math.isfinite(value)}
        if self.skipped:
            return row
        return {"train/loss": self.loss, **row}

    def start_reduce(self, loss: Tensor, *, stop: bool, save: bool, gradient_failed: Tensor | None) -> None:
        """Start to sum the loss and three flags over ranks, and to copy all scalars to the host."""
        loss = at_least_float32(loss.detach())
        # `new_full` is filled on the device; `new_tensor` would wait for a copy from the host.
        failed = loss.new_zeros(()) if gradient_failed is None else gradient_failed.to(loss)
        summed = torch.stack([loss, loss.new_full((), float(stop)), loss.new_full((), float(save)), failed])
        self._receive = _start_reduce(summed, [loss, *self._scalars.values()])

    def wait(self) -> list[float] | None:
        """Wait for the values. Returns how many ranks ask to stop, ask to save, and had a gradient that is not finite.

        None if the values had arrived before.
        """
        if self._receive is None:
            return None
        numbers = self._receive()
        total, *flags = numbers[:SUMMED]
        self.local_loss, *scalars = numbers[SUMMED:]
        self.loss = total / world_size()
        self.values.update(zip(self._scalars, scalars, strict=True))
        self._receive, self._scalars = None, {}
        return flags


class MetricsBuffer:
    """The metrics of micro-batches that are not yet published, and the running mean of those that are."""

    def __init__(self) -> None:
        self.latest: float | None = None
        """The loss that was published last."""
        self.request_stop = False
        """Set on this rank to end the run; sent once, with the next loss, and then reset."""
        self.request_save = False
        """The same, to write a checkpoint."""
        self.stop_requested = False
        """Whether any rank asked to stop, known on all ranks in the same optimizer step; True until it is reset."""
        self.save_requested = False
        """Whether any rank asked to save."""
        self.gradient_failed: Tensor | None = None
        """Flag of the previous step, on the device: whether a gradient was not finite. Sent with the next loss."""
        self.gradients_failed = False
        """Whether that flag was set on any rank."""
        self._current: StepMetrics | None = None
        self._for_next: dict[str, Tensor] = {}
        self._pending: deque[StepMetrics] = deque()
        self._weighted_loss, self._images = 0.0, 0

    @property
    def pending(self) -> list[StepMetrics]:
        """The metrics that are not yet published, oldest first."""
        return list(self._pending)

    def begin(self, *, step: int, epoch: int, images: int, logged: bool) -> None:
        """Start to record a micro-batch."""
        self._current = StepMetrics(step, epoch, images, logged, from_previous_step=set(self._for_next))
        for name, value in self._for_next.items():
            self._current.record(name, value)
        self._for_next = {}

    def record_for_next(self, name: str, value: Tensor) -> None:
        """Record a device scalar for the next micro-batch; it is copied together with that loss."""
        self._for_next[name] = value

    def record(self, name: str, value: Tensor | float) -> None:
        """Record a metric of the current micro-batch; numbers are accepted after `start_reduce`, too."""
        if self._current is not None:
            self._current.record(name, value)

    def start_reduce(self, loss: Tensor) -> None:
        """Start to copy the metrics of the current micro-batch; a collective call."""
        assert self._current is not None, "call `begin` first"
        stop, save = self.request_stop, self.request_save
        # A signal handler may set a request between two of these lines: reset only what is sent.
        if stop:
            self.request_stop = False
        if save:
            self.request_save = False
        self._current.start_reduce(loss, stop=stop, save=save, gradient_failed=self.gradient_failed)
        self.gradient_failed = None
        self._pending.append(self._current)

    def wait(self) -> None:
        """Wait until the values of all pending micro-batches and the flags have arrived."""
        for metrics in self._pending:
            if (flags := metrics.wait()) is not None:
                stop, save, gradient_failed = (ranks > 0 for ranks in flags)
                self.stop_requested |= stop
                self.save_requested |= save
                self.gradients_failed |= gradient_failed

    def drain(self, publish: Callable[[StepMetrics], None]) -> None:
        """Pass all metrics that have arrived to `publish`, oldest first.

        If `publish` raises, the entry stays queued, so the error is raised again on the next call.
        """
        while self._pending and self._pending[0].has_arrived:
            metrics = self._pending[0]
            publish(metrics)
            self._pending.popleft()
            if not metrics.skipped:
                self.latest = metrics.loss
                self._weighted_loss += metrics.loss * metrics.images
                self._images += metrics.images

    def flush(self, publish: Callable[[StepMetrics], None]) -> None:
        """Wait for the metrics of all steps so far, and publish them."""
        self.wait()
        # The gradient flag of the last step otherwise comes with the next loss.
        failed, self.gradient_failed = self.gradient_failed, None
        if failed is not None:
            self.gradients_failed |= read_now(failed)
        self.drain(publish)

    def state_dict(self) -> dict[str, float]:
        """The sums behind the epoch's mean loss; call `flush` first, since pending metrics are not included."""
        return {"weighted": self._weighted_loss, "images": self._images}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the sums behind the epoch's mean loss."""
        self._weighted_loss, self._images = state["weighted"], int(state["images"])

    def pop_epoch_mean(self) -> float | None:
        """Mean loss over the images since the last call, or None without any."""
        mean = self._weighted_loss / self._images if self._images else None
        self._weighted_loss, self._images = 0.0, 0
        return mean


def read_now(flag: Tensor) -> bool:
    """The value of a flag on the device; waits for everything before it in the device's queue."""
    return bool(flag.tolist())


def _start_reduce(summed: Tensor, scalars: list[Tensor]) -> Callable[[], list[float]]:
    """Start to sum `summed` (n,) over ranks and to copy it and this rank's scalars; returns a function that waits."""
    total = all_reduce_sum_later(summed)
    # A new tensor, since a scalar may be changed in place before it is copied.
    local = torch.stack([scalar.to(summed.dtype) for scalar in scalars])
    if summed.device.type != "cuda":
        return lambda: [*total().tolist(), *local.tolist()]
    # In a side stream: the next kernels wait neither for the copies nor for the loss of slower ranks, and the host
    # waits for this point of the queue, not for its end.
    stream = _side_stream(summed.device)
    stream.wait_stream(torch.cuda.current_stream(summed.device))
    with torch.cuda.stream(stream):
        on_host = torch.empty(len(summed) + len(local), dtype=summed.dtype, pin_memory=True)
        on_host[: len(summed)].copy_(total(), non_blocking=True)
        on_host[len(summed) :].copy_(local, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)  # waiting for it sleeps, which leaves the core to a loader process
        copied.record(stream)
    # Keeps the sources alive until they are copied; PyTorch would otherwise reuse their memory.
    return partial(_receive, on_host, copied=copied, sources=(total, local))


def _receive(on_host: Tensor, *, copied: torch.cuda.Event, sources: object) -> list[float]:
    copied.synchronize()
    return on_host.tolist()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
