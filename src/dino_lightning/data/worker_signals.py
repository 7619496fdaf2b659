"""Loader processes leave OS signals to their main process.

A scheduler that preempts a job signals every process of the job, and Ctrl-C reaches every process of a terminal. If a
loader process died, the main process would fail before it has saved a checkpoint.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

IGNORED = ("SIGINT", "SIGUSR1", "SIGUSR2")


def ignore_foreign_signals() -> None:
    """Ignore signals that stop a run, except SIGTERM from the parent, with which PyTorch ends its loader processes.

    Call it in the main thread of a new process, before other threads start. If the system does not report the sender of
    a signal (macOS, Windows), SIGTERM always ends the process.
    """
    for name in IGNORED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        # Blocked in this and all later threads, so that the waiting thread receives it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, name="signals", daemon=True).start()


@contextmanager
def sigterm_blocked() -> Iterator[None]:
    """Block SIGTERM in this thread, and so in processes that are started in the block.

    Libraries such as OpenBLAS start threads in a new process before our code runs there, and an unblocked signal in one
    of them would end the process.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait_for_parent() -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == os.getppid():
            os._exit(0)  # like PyTorch's handler; a loader process has nothing to save
