"""Signals of schedulers before training starts and after it ends.

There is nothing to save then: all files are complete, and the next start continues from them. The process exits
immediately, with the status that requests a restart instead of the status of a killed process.

This module imports no slow libraries, so that its handlers are active while those are imported.
"""

import os
import signal
import sys
from types import FrameType

from dino_lightning.runtime.scheduler import PREEMPTED, requeue_slurm_job
from dino_lightning.runtime.watchdog import STARTED_BY

NAMES = ("SIGTERM", "SIGUSR1")


def install_early_handlers() -> None:
    """Install `exit_on_signal` for signals that have no other handler.

    Processes that the first one of a machine has started do not: if only such a process gets the signal, the first one
    has to notice that it is lost instead of waiting for it.
    """
    if STARTED_BY not in os.environ:
        _replace(signal.SIG_DFL, by=exit_on_signal)
        if hasattr(os, "register_at_fork"):
            # In a forked process the default applies again: its parent ends it.
            os.register_at_fork(after_in_child=lambda: _replace(exit_on_signal, by=signal.SIG_DFL))


def exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Print the reason, ask SLURM to requeue the job if that was its signal, and exit with `PREEMPTED`."""
    name = signal.Signals(number).name
    message = f"\n{name} outside of training: nothing to save, exiting immediately with status {PREEMPTED}.\n"
    os.write(sys.stderr.fileno(), message.encode())  # not `print`: a handler may interrupt one
    if name == "SIGUSR1" and os.environ.get("SLURM_PROCID", "0") == "0":
        requeue_slurm_job()
    os._exit(PREEMPTED)


def ignore_at_shutdown() -> None:
    """Ignore signals while Python shuts down: everything is written, and a signal must not make the run fail."""
    _replace(exit_on_signal, by=signal.SIG_IGN)


def _replace(before: object, *, by: object) -> None:
    for name in NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == before:
            signal.signal(number, by)  # type: ignore[arg-type]
