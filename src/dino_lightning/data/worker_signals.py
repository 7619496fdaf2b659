"""Loader processes leave it to their main process to obey signals.

A scheduler that takes a machine away sends its signal to every process of a job, and Ctrl-C reaches every process of a
terminal. A loader process that died of it would take the main one down before that has saved.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LEFT_TO_OTHERS = ("SIGINT", "SIGUSR1", "SIGUSR2")


def obey_parent_alone() -> None:
    """Ignore what asks a run to end, unless the parent sends it: PyTorch ends its loader processes with SIGTERM.

    Called in a new process by its main thread, before it starts other threads. Where the system cannot tell who has
    sent a signal (macOS, Windows), SIGTERM keeps its effect.
    """
    for name in LEFT_TO_OTHERS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        # Blocked here and in the threads to come, it goes to the one that waits for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, name="signals", daemon=True).start()


@contextmanager
def held_back() -> Iterator[None]:
    """Hold SIGTERM back from this thread, so that processes started within begin like that.

    Libraries such as OpenBLAS start threads in a new process before anything of ours runs there. One that took the
    signal would end the process.
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
            os._exit(0)  # as PyTorch's own handler does; nothing of a loader process is worth keeping
