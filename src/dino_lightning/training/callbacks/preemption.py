"""Preemption: a run that receives a signal saves after the current optimizer step and exits with its own status.

Schedulers send SIGTERM or SIGUSR1 before they take a machine away, submitit sends SIGUSR2, and a person presses Ctrl-C.
A signal to one rank reaches all ranks in the same step: it travels with the loss (`methods/metrics_buffer.py`).
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

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT") if hasattr(signal, name)]

Handler = Callable[[int, FrameType | None], Any]


class Preempted(BaseException):
    """Raised after a checkpoint was saved on request. Derives from BaseException so that no handler swallows it."""

    def __init__(self, status: int, *, restart: Callable[[], Any] | None = None) -> None:
        super().__init__(f"the run was saved and ends with status {status}; resume=true continues it")
        self.status = status
        self.restart = restart
        """Makes the scheduler restart the run; called on rank 0 after everything is closed."""


class PreemptionHandler(L.Callback):
    """Handles signals while training. It is the first callback, so that its handlers are installed before the others'
    work."""

    def __init__(self) -> None:
        self.earlier_handlers: dict[int, Any] = {}
        """The handlers that were installed before the run, such as submitit's."""
        self.received: int | None = None
        """The signal that this rank has received."""
        self._method: Method | None = None

    def stop_requested_anywhere(self) -> bool:
        """Whether any rank has received a signal; all ranks call it together."""
        known = self._method is not None and self._method.metrics.stop_requested
        return any_rank(known or self.received is not None)

    def preempted(self) -> Preempted:
        """The exception to raise once the run is saved."""
        number, launcher_handler = self.received, self._launcher_handler(self.received)
        if number == signal.SIGINT:
            return Preempted(INTERRUPTED)
        if number is not None and launcher_handler is not None:  # submitit's, which submits the job again
            return Preempted(PREEMPTED, restart=lambda: launcher_handler(number, None))
        return Preempted(PREEMPTED, restart=requeue_slurm_job if number == getattr(signal, "SIGUSR1", None) else None)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remember the installed handlers: Lightning replaces them by its own before training starts."""
        self.earlier_handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def _launcher_handler(self, number: int | None) -> Handler | None:
        """The handler that a launcher such as submitit has installed for a signal, not our own early one."""
        handler = self.earlier_handlers.get(number or 0)
        return cast(Handler, handler) if callable(handler) and handler is not exit_on_signal else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the handlers."""
        self._method = cast(Method, pl_module)
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows signal handlers in the main thread only
        for number in SIGNALS:
            # By default SIGUSR2 ends a process; only submitit sends it to request a stop.
            if number != getattr(signal, "SIGUSR2", None) or self._launcher_handler(number):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt  # the second Ctrl-C stops immediately
        if number == signal.SIGTERM and (launcher_handler := self._launcher_handler(number)):
            # Under submitit SIGTERM is only a warning; submitit's own signal follows.
            if self._method is not None:
                self._method.metrics.request_save = True
            launcher_handler(number, frame)
            return
        self.received = number
        name = signal.Signals(number).name
        hint = " Press Ctrl-C again to stop immediately." if number == signal.SIGINT else ""
        # Not `print`: a handler may interrupt one.
        os.write(sys.stderr.fileno(), f"\n{name}: saving after this step, then exiting.{hint}\n".encode())

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Send the request to the other ranks with the loss of this batch."""
        if self.received is not None:
            pl_module.metrics.request_stop = True

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        """Restore the earlier handlers, also at the end of the training."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.earlier_handlers.items():
                if handler is not None and signal.getsignal(number) == self._handle:
                    signal.signal(number, handler)

    teardown = on_exception
