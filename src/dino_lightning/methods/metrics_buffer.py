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
    """Mean over ranks. It, `own_loss` and device scalars among `values` are known once the reading has arrived."""
    own_loss: float = float("nan")
    """Of this rank."""
    ends_step: bool = False
    """Whether it is the last micro-batch of its optimizer step."""
    left_out: bool = False
    """Whether its step moves nothing, so that it counts for no mean."""
    values: dict[str, float] = field(default_factory=dict)
    of_step_before: set[str] = field(default_factory=set)
    """Names of values that were measured before the micro-batch began."""
    _scalars: dict[str, Tensor] = field(default_factory=dict)
    _arrive: Callable[[], list[float]] | None = None

    @property
    def has_arrived(self) -> bool:
        """Whether its figures are here."""
        return self._arrive is None

    def note(self, name: str, value: Tensor | float) -> None:
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
        unsure = row if self.left_out else self.of_step_before
        row = {name: value for name, value in row.items() if name not in unsure or math.isfinite(value)}
        if self.left_out:
            return row
        return {"train/loss": self.loss, **row}

    def send(self, loss: Tensor, *, leave: bool, save: bool, gradient: Tensor | None) -> None:
        """Start the mean of the loss and the sums of three flags over ranks, and the way of all scalars to the host."""
        loss = at_least_float32(loss.detach())
        # `new_full`, not `new_tensor`: it is filled on the device, while a number from here is waited for.
        failed = loss.new_zeros(()) if gradient is None else gradient.to(loss)
        shared = torch.stack([loss, loss.new_full((), float(leave)), loss.new_full((), float(save)), failed])
        self._arrive = _send(shared, [loss, *self._scalars.values()])

    def arrive(self) -> list[float] | None:
        """Wait for what was sent; how many ranks ask to leave, to save, and tell of a gradient that is not finite.

        None where it had arrived before.
        """
        if self._arrive is None:
            return None
        total, *flags = (figures := self._arrive())[:SHARED]
        self.own_loss, *others = figures[SHARED:]
        self.loss = total / world_size()
        self.values.update(zip(self._scalars, others, strict=True))
        self._arrive, self._scalars = None, {}
        return flags


class Readings:
    """Readings that were sent and not yet handed over, and what is known of those that were."""

    def __init__(self) -> None:
        self.latest: float | None = None
        """The loss that was handed over last."""
        self.ask_to_leave = False
        """Set by this rank to end the run; travels once, with the next loss, and is False from then on."""
        self.ask_to_save = False
        """The same, to write a checkpoint."""
        self.leave_asked = False
        """Whether a rank asked, known on all ranks in the same optimizer step; stays True until somebody resets it."""
        self.save_asked = False
        """The same, of `ask_to_save`."""
        self.gradient_failed: Tensor | None = None
        """Of the step before, on the device: 1 where a gradient was not finite. Travels with the next loss."""
        self.gradients_failed = False
        """Whether that has arrived from a rank."""
        self._open: Reading | None = None
        self._carried: dict[str, Tensor] = {}
        self._sent: deque[Reading] = deque()
        self._weighted, self._images = 0.0, 0

    @property
    def waiting(self) -> list[Reading]:
        """Those not handed over, in their order."""
        return list(self._sent)

    def open(self, *, step: int, epoch: int, images: int, logged: bool) -> None:
        """Start the reading of a micro-batch."""
        self._open = Reading(step, epoch, images, logged, of_step_before=set(self._carried))
        for name, value in self._carried.items():
            self._open.note(name, value)
        self._carried = {}

    def carry(self, name: str, value: Tensor) -> None:
        """Add a device scalar to the micro-batch that is opened next, with whose loss it travels."""
        self._carried[name] = value

    def note(self, name: str, value: Tensor | float) -> None:
        """Add a figure to the micro-batch that was opened last; numbers also after it was sent."""
        if self._open is not None:
            self._open.note(name, value)

    def send(self, loss: Tensor) -> None:
        """Send the figures of the open micro-batch off; all ranks together."""
        assert self._open is not None, "`open` comes first"
        leave, save = self.ask_to_leave, self.ask_to_save
        # A signal may ask between two of these lines: only what is sent is taken back.
        if leave:
            self.ask_to_leave = False
        if save:
            self.ask_to_save = False
        self._open.send(loss, leave=leave, save=save, gradient=self.gradient_failed)
        self.gradient_failed = None
        self._sent.append(self._open)

    def arrive(self) -> None:
        """Wait for all that was sent; flags and losses are known from then on, and numbers can still be noted."""
        for reading in self._sent:
            if (flags := reading.arrive()) is not None:
                leave, save, gradient = (ranks > 0 for ranks in flags)
                self.leave_asked |= leave
                self.save_asked |= save
                self.gradients_failed |= gradient

    def settle(self) -> None:
        """Learn of the step before what the next loss would tell; the program waits for that step."""
        self.arrive()
        failed, self.gradient_failed = self.gradient_failed, None
        if failed is not None:
            self.gradients_failed |= read_now(failed)

    def hand_over(self, use: Callable[[Reading], None]) -> None:
        """Give all readings that have arrived to `use`, in their order.

        One for which it raises an error stays, and so it does again the next time: no way leads around it.
        """
        while self._sent and self._sent[0].has_arrived:
            reading = self._sent[0]
            use(reading)
            self._sent.popleft()
            if not reading.left_out:
                self.latest = reading.loss
                self._weighted += reading.loss * reading.images
                self._images += reading.images

    def collect(self, use: Callable[[Reading], None]) -> None:
        """Wait for all that is known of the steps so far, and hand it over."""
        self.settle()
        self.hand_over(use)

    def state_dict(self) -> dict[str, float]:
        """What the mean of the epoch is made of, in plain types; what was only sent is not in it: collect first."""
        return {"weighted": self._weighted, "images": self._images}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on with that mean."""
        self._weighted, self._images = state["weighted"], int(state["images"])

    def take_mean(self) -> float | None:
        """Mean loss over the images since the last call; None where there were none."""
        mean = self._weighted / self._images if self._images else None
        self._weighted, self._images = 0.0, 0
        return mean


def read_now(flag: Tensor) -> bool:
    """A flag on the device; the program waits for everything in the device's queue before it."""
    return bool(flag.tolist())


def _send(shared: Tensor, scalars: list[Tensor]) -> Callable[[], list[float]]:
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
