"""Signals: a run that is told to end saves at the next optimizer step and leaves with a status that says so.

Schedulers send SIGTERM or SIGUSR1 before they take a machine away, submitit SIGUSR2, and a person presses Ctrl-C. What
arrives on one rank is known to all in the same step: it travels with the loss (`readings`).
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import lightning as L

from dino_lightning.methods.base import Method
from dino_lightning.runtime.collectives import any_rank
from dino_lightning.runtime.scheduler import INTERRUPTED, PREEMPTED, requeue_slurm_job
from dino_lightning.runtime.signals import exit_on_signal

NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")

Handler = Callable[[int, FrameType | None], Any]


class Preempted(BaseException):
    """The run has saved and ends here. Not an `Exception`: nothing is wrong, and nobody should go on after it."""

    def __init__(self, status: int, *, then: Callable[[], Any] | None = None) -> None:
        super().__init__(f"the run has saved and ends here, with status {status}; resume=true goes on with it")
        self.status = status
        self.then = then
        """What to call on rank 0 when all is closed, so that the run is started again."""


class PreemptionHandler(L.Callback):
    """Takes note of signals while training. Stands first, so that it listens before anything long begins."""

    def __init__(self) -> None:
        self.before: dict[int, Any] = {}
        """The handlers that were installed around the run, such as submitit's."""
        self.received: int | None = None
        self._method: Method | None = None

    @property
    def asked(self) -> bool:
        """Whether this rank was told to end."""
        return self.received is not None

    def asked_anywhere(self) -> bool:
        """Whether any rank was told to end; all ranks ask together."""
        return any_rank(self.asked or (self._method is not None and self._method.metrics.stop_requested))

    def leaving(self) -> Preempted:
        """What to raise when the run has saved."""
        number, before = self.received, self._of_launcher(self.received)
        if number == signal.SIGINT:
            return Preempted(INTERRUPTED)
        if number is not None and before is not None:  # submitit's handler, which submits the job again
            return Preempted(PREEMPTED, then=lambda: before(number, None))
        return Preempted(PREEMPTED, then=requeue_slurm_job if number == getattr(signal, "SIGUSR1", None) else None)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remember who listens already: Lightning puts its own handlers into their place before training starts."""
        self.before = {number: signal.getsignal(number) for number in _numbers()}

    def _of_launcher(self, number: int | None) -> Handler | None:
        """The handler that a launcher such as submitit has for a signal; not our own for the time outside training."""
        before = self.before.get(number or 0)
        return cast(Handler, before) if callable(before) and before is not exit_on_signal else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen."""
        self._method = cast(Method, pl_module)
        if threading.current_thread() is not threading.main_thread():
            return  # Python hands signals to the main thread alone
        for number in _numbers():
            # SIGUSR2 ends a process that does not expect it, and it is expected under submitit alone.
            if number != getattr(signal, "SIGUSR2", None) or self._of_launcher(number):
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt  # the second Ctrl-C: at once
        if number == signal.SIGTERM and (before := self._of_launcher(number)):
            # Under submitit SIGTERM is a warning only; its own signal follows.
            if self._method is not None:
                self._method.metrics.request_save = True
            before(number, frame)
            return
        self.received = number
        name = signal.Signals(number).name
        again = " Ctrl-C again ends it at once." if number == signal.SIGINT else ""
        # Not `print`: a handler may interrupt one.
        os.write(sys.stderr.fileno(), f"\n{name}: saving at the end of this step, then leaving.{again}\n".encode())

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tell the other ranks, with the loss of this batch."""
        if self.asked:
            cast(Method, pl_module).metrics.request_stop = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the handlers back."""
        self._give_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the handlers back."""
        self._give_back()

    def _give_back(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.before.items():
                if handler is not None and signal.getsignal(number) == self._note:
                    signal.signal(number, handler)


def _numbers() -> list[int]:
    return [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
