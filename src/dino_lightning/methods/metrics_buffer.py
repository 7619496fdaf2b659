"""What a step measures, on its way to the host while the device goes on.

A program that asks for a loss (`loss.item()`) waits until the device has worked off its queue, and then the device
waits until the program has filled it again. Here a micro-batch only sends its figures off. They arrive when the
backward pass stands in the device's queue and before the weights move: if they are not there yet, the device still has
that pass to do while the program waits. So all ranks know in the same step whether the loss of one is not finite, and
whether one was asked to leave or to save. What was noted until the micro-batch's end is handed over with them, later.
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

SHARED = 4
"""Numbers that are summed over ranks with each micro-batch: the loss, and three flags."""


@dataclass
class StepMetrics:
    """The figures of one micro-batch."""

    step: int
    """Index of the optimizer step it belongs to."""
    epoch: int
    images: int
    """Of this rank: its weight in the mean of the epoch."""
    logged: bool
    """Whether anything but the loss is kept."""
    loss: float = float("nan")
    """Mean over ranks. It, `own_loss` and device scalars among `values` are known once the reading has arrived."""
    local_loss: float = float("nan")
    """Of this rank."""
    is_last_micro_batch: bool = False
    """Whether it is the last micro-batch of its optimizer step."""
    skipped: bool = False
    """Whether its step moves nothing, so that it counts for no mean."""
    values: dict[str, float] = field(default_factory=dict)
    from_previous_step: set[str] = field(default_factory=set)
    """Names of values that were measured before the micro-batch began."""
    _scalars: dict[str, Tensor] = field(default_factory=dict)
    _arrive: Callable[[], list[float]] | None = None

    @property
    def has_arrived(self) -> bool:
        """Whether its figures are here."""
        return self._arrive is None

    def record(self, name: str, value: Tensor | float) -> None:
        """Keep a figure; a tensor must be a scalar and come before `send`."""
        if not self.logged:
            return
        if isinstance(value, Tensor):
            assert self._arrive is None, f"{name}: device scalars are noted before the loss is sent"
            self._scalars[name] = value.detach()
        else:
            self.values[name] = value

    def row(self) -> dict[str, float]:
        """What is logged; of a step that moves nothing, only what is a number."""
        row = {**self.values, "epoch": self.epoch}
        # A gradient norm that is not finite is of a step that moved nothing: of one that was left out, or of fp16's.
        unsure = row if self.skipped else self.from_previous_step
        row = {name: value for name, value in row.items() if name not in unsure or math.isfinite(value)}
        if self.skipped:
            return row
        return {"train/loss": self.loss, **row}

    def start_reduce(self, loss: Tensor, *, leave: bool, save: bool, gradient: Tensor | None) -> None:
        """Start the mean of the loss and the sums of three flags over ranks, and the way of all scalars to the host."""
        loss = at_least_float32(loss.detach())
        # `new_full`, not `new_tensor`: it is filled on the device, while a number from here is waited for.
        failed = loss.new_zeros(()) if gradient is None else gradient.to(loss)
        shared = torch.stack([loss, loss.new_full((), float(leave)), loss.new_full((), float(save)), failed])
        self._arrive = _start_reduce(shared, [loss, *self._scalars.values()])

    def wait(self) -> list[float] | None:
        """Wait for what was sent; how many ranks ask to leave, to save, and tell of a gradient that is not finite.

        None where it had arrived before.
        """
        if self._arrive is None:
            return None
        total, *flags = (figures := self._arrive())[:SHARED]
        self.local_loss, *others = figures[SHARED:]
        self.loss = total / world_size()
        self.values.update(zip(self._scalars, others, strict=True))
        self._arrive, self._scalars = None, {}
        return flags


class MetricsBuffer:
    """Readings that were sent and not yet handed over, and what is known of those that were."""

    def __init__(self) -> None:
        self.latest: float | None = None
        """The loss that was handed over last."""
        self.request_stop = False
        """Set by this rank to end the run; travels once, with the next loss, and is False from then on."""
        self.request_save = False
        """The same, to write a checkpoint."""
        self.stop_requested = False
        """Whether a rank asked, known on all ranks in the same optimizer step; stays True until somebody resets it."""
        self.save_requested = False
        """The same, of `ask_to_save`."""
        self.gradient_failed: Tensor | None = None
        """Of the step before, on the device: 1 where a gradient was not finite. Travels with the next loss."""
        self.gradients_failed = False
        """Whether that has arrived from a rank."""
        self._open: StepMetrics | None = None
        self._carried: dict[str, Tensor] = {}
        self._sent: deque[StepMetrics] = deque()
        self._weighted, self._images = 0.0, 0

    @property
    def pending(self) -> list[StepMetrics]:
        """Those not handed over, in their order."""
        return list(self._sent)

    def begin(self, *, step: int, epoch: int, images: int, logged: bool) -> None:
        """Start the reading of a micro-batch."""
        self._open = StepMetrics(step, epoch, images, logged, from_previous_step=set(self._carried))
        for name, value in self._carried.items():
            self._open.record(name, value)
        self._carried = {}

    def record_for_next(self, name: str, value: Tensor) -> None:
        """Add a device scalar to the micro-batch that is opened next, with whose loss it travels."""
        self._carried[name] = value

    def record(self, name: str, value: Tensor | float) -> None:
        """Add a figure to the micro-batch that was opened last; numbers also after it was sent."""
        if self._open is not None:
            self._open.record(name, value)

    def start_reduce(self, loss: Tensor) -> None:
        """Send the figures of the open micro-batch off; all ranks together."""
        assert self._open is not None, "`open` comes first"
        leave, save = self.request_stop, self.request_save
        # A signal may ask between two of these lines: only what is sent is taken back.
        if leave:
            self.request_stop = False
        if save:
            self.request_save = False
        self._open.start_reduce(loss, leave=leave, save=save, gradient=self.gradient_failed)
        self.gradient_failed = None
        self._sent.append(self._open)

    def wait(self) -> None:
        """Wait for all that was sent; flags and losses are known from then on, and numbers can still be noted."""
        for reading in self._sent:
            if (flags := reading.wait()) is not None:
                leave, save, gradient = (ranks > 0 for ranks in flags)
                self.stop_requested |= leave
                self.save_requested |= save
                self.gradients_failed |= gradient

    def wait_all(self) -> None:
        """Learn of the step before what the next loss would tell; the program waits for that step."""
        self.wait()
        failed, self.gradient_failed = self.gradient_failed, None
        if failed is not None:
            self.gradients_failed |= read_now(failed)

    def drain(self, use: Callable[[StepMetrics], None]) -> None:
        """Give all readings that have arrived to `use`, in their order.

        One for which it raises an error stays, and so it does again the next time: no way leads around it.
        """
        while self._sent and self._sent[0].has_arrived:
            reading = self._sent[0]
            use(reading)
            self._sent.popleft()
            if not reading.skipped:
                self.latest = reading.loss
                self._weighted += reading.loss * reading.images
                self._images += reading.images

    def flush(self, use: Callable[[StepMetrics], None]) -> None:
        """Wait for all that is known of the steps so far, and hand it over."""
        self.wait_all()
        self.drain(use)

    def state_dict(self) -> dict[str, float]:
        """What the mean of the epoch is made of, in plain types; what was only sent is not in it: collect first."""
        return {"weighted": self._weighted, "images": self._images}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on with that mean."""
        self._weighted, self._images = state["weighted"], int(state["images"])

    def pop_epoch_mean(self) -> float | None:
        """Mean loss over the images since the last call; None where there were none."""
        mean = self._weighted / self._images if self._images else None
        self._weighted, self._images = 0.0, 0
        return mean


def read_now(flag: Tensor) -> bool:
    """A flag on the device; the program waits for everything in the device's queue before it."""
    return bool(flag.tolist())


def _start_reduce(shared: Tensor, scalars: list[Tensor]) -> Callable[[], list[float]]:
    """Start on their way `shared` (n,), summed over ranks, and scalars of this rank; the call waits for them."""
    total = all_reduce_sum_later(shared)
    # Copied now, since a scalar may be changed in place before it has left.
    others = torch.stack([scalar.to(shared.dtype) for scalar in scalars])
    if shared.device.type != "cuda":
        return lambda: [*total().tolist(), *others.tolist()]
    # In a stream of their own: the next kernels wait neither for the copies nor for the loss of slower ranks, and the
    # program waits for this point of the queue, not for its end.
    stream = _side_stream(shared.device)
    stream.wait_stream(torch.cuda.current_stream(shared.device))
    with torch.cuda.stream(stream):
        on_host = torch.empty(len(shared) + len(others), dtype=shared.dtype, pin_memory=True)
        on_host[: len(shared)].copy_(total(), non_blocking=True)
        on_host[len(shared) :].copy_(others, non_blocking=True)
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
