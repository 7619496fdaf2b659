"""What a step measures, on its way to the host while the device goes on.

A program that asks for a loss (`loss.item()`) waits until the device has worked off its queue, and then the device
waits until the program has filled it again. Here a micro-batch only sends its figures off, and the next one collects
them. If they are not there yet, the device still has that micro-batch's backward pass to do while the program waits.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor

from dino_lightning.distributed import all_reduce_sum_later, world_size
from dino_lightning.numerics import at_least_float32


@dataclass
class Reading:
    """The figures of one micro-batch."""

    step: int
    """Index of the optimizer step it belongs to."""
    epoch: int
    images: int
    """Of this rank: its weight in the mean of the epoch."""
    logged: bool
    """Whether anything but the loss is kept."""
    loss: float = float("nan")
    """Mean over ranks. It and device scalars among `values` are known once the reading has been collected."""
    values: dict[str, float] = field(default_factory=dict)
    _scalars: dict[str, Tensor] = field(default_factory=dict)
    _arrive: Callable[[], list[float]] | None = None

    def note(self, name: str, value: Tensor | float) -> None:
        """Keep a figure; a tensor must be a scalar and come before `send`."""
        if not self.logged:
            return
        if isinstance(value, Tensor):
            assert self._arrive is None, f"{name}: device scalars are noted before the loss is sent"
            self._scalars[name] = value.detach()
        else:
            self.values[name] = value

    def send(self, loss: Tensor) -> None:
        """Start the mean of the loss over ranks, and the way of all device scalars to the host."""
        self._arrive = _send(loss, list(self._scalars.values()))

    def arrive(self) -> "Reading":
        """Wait for what was sent."""
        if self._arrive is not None:
            total, *others = self._arrive()
            self.loss = total / world_size()
            self.values.update(zip(self._scalars, others, strict=True))
            self._arrive, self._scalars = None, {}
        return self


class Readings:
    """Readings that were sent and not yet collected, and what is known of those that were."""

    def __init__(self) -> None:
        self.latest: float | None = None
        """The loss that was collected last."""
        self._open: Reading | None = None
        self._sent: deque[Reading] = deque()
        self._weighted, self._images = 0.0, 0

    def open(self, *, step: int, epoch: int, images: int, logged: bool) -> None:
        """Start the reading of a micro-batch."""
        self._open = Reading(step, epoch, images, logged)

    def note(self, name: str, value: Tensor | float) -> None:
        """Add a figure to the micro-batch that was opened last; numbers also after it was sent."""
        if self._open is not None:
            self._open.note(name, value)

    def send(self, loss: Tensor) -> None:
        """Send the figures of the open micro-batch off; all ranks together."""
        assert self._open is not None, "`open` comes first"
        self._open.send(loss)
        self._sent.append(self._open)

    def collect(self, use: Callable[[Reading], None]) -> None:
        """Hand over, in their order, all readings that were sent.

        One for which `use` raises an error stays, and so it does again the next time: no way leads around it.
        """
        while self._sent:
            reading = self._sent[0].arrive()
            use(reading)
            self._sent.popleft()
            self.latest = reading.loss
            self._weighted += reading.loss * reading.images
            self._images += reading.images

    def take_mean(self) -> float | None:
        """Mean loss over the images since the last call; None where there were none."""
        mean = self._weighted / self._images if self._images else None
        self._weighted, self._images = 0.0, 0
        return mean


def _send(loss: Tensor, scalars: list[Tensor]) -> Callable[[], list[float]]:
    """Start on their way the loss, summed over ranks, and other scalars; the call waits for them."""
    loss = at_least_float32(loss.detach())
    total = all_reduce_sum_later(loss)
    # Copied now, since a scalar may be changed in place before it has left.
    others = torch.stack([scalar.to(loss.dtype) for scalar in scalars]) if scalars else loss.new_empty(0)
    if loss.device.type != "cuda":
        return lambda: [*total().reshape(1).tolist(), *others.tolist()]
    # In a stream of their own: the next kernels wait neither for the copies nor for the loss of slower ranks, and the
    # program waits for this point of the queue, not for its end.
    stream = _side_stream(loss.device)
    stream.wait_stream(torch.cuda.current_stream(loss.device))
    with torch.cuda.stream(stream):
        on_host = torch.empty(1 + len(others), dtype=loss.dtype, pin_memory=True)
        on_host[:1].copy_(total().reshape(1), non_blocking=True)
        on_host[1:].copy_(others, non_blocking=True)
        there = torch.cuda.Event(blocking=True)  # who waits for it sleeps, and leaves the core to a loader
        there.record(stream)
    # What is copied is kept until it has been: its memory would be given to other tensors.
    return partial(_receive, on_host, there=there, sources=(total, others))


def _receive(on_host: Tensor, *, there: torch.cuda.Event, sources: object) -> list[float]:
    there.synchronize()
    return on_host.tolist()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
