"""Signals of schedulers before training has begun and after it has ended.

Then there is nothing to save: what is on the disk is whole, and the next start does the rest. So the process leaves at
once, with the status that has it started again instead of that of a process which was killed.

Floor 0: needs none of the libraries that take long to import, and listens while they are imported.
"""

import os
import signal
import sys
from types import FrameType

from dino_lightning.runtime.scheduler import PREEMPTED, requeue_slurm_job
from dino_lightning.runtime.watchdog import STARTED_BY

NAMES = ("SIGTERM", "SIGUSR1")


def install_early_handlers() -> None:
    """From now on a signal ends this process by `leave_at_once`, unless somebody else listens to it already.

    Not in a process that the first one of a machine has started: if it alone gets the signal, the first has to see that
    it is lost, or would wait for it.
    """
    if STARTED_BY not in os.environ:
        _replace(signal.SIG_DFL, by=exit_on_signal)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    """A process that this one has forked is to end as its parent wants it to."""
    _replace(exit_on_signal, by=signal.SIG_DFL)


def exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Say why, ask SLURM for another start if that was its signal, and leave with `PREEMPTED`."""
    name = signal.Signals(number).name
    said = f"\n{name} outside of training: nothing to save, leaving at once with status {PREEMPTED}.\n"
    os.write(sys.stderr.fileno(), said.encode())  # not `print`: a handler may interrupt one
    if name == "SIGUSR1" and os.environ.get("SLURM_PROCID", "0") == "0":
        requeue_slurm_job()
    os._exit(PREEMPTED)


def ignore_at_shutdown() -> None:
    """All is written: no signal makes a failure of the seconds in which Python takes its libraries apart."""
    _replace(exit_on_signal, by=signal.SIG_IGN)


def _replace(before: object, *, by: object) -> None:
    for name in NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == before:
            signal.signal(number, by)  # type: ignore[arg-type]
