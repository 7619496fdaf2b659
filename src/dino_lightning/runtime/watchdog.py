"""Processes of one machine that watch each other: none outlives another that has failed.

Floor 0: needs the standard library alone.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dino_lightning.runtime.scheduler import INTERRUPTED, PREEMPTED

STARTED_BY = "DINO_LIGHTNING_STARTED_BY"
"""Environment variable of the started processes: number of the process that started them."""
LOOK_S = 0.5
"""Seconds between two looks at the other processes."""
OWN_END_S = 3.0
"""Seconds in which the first process may end by itself, with words of its own, after another has failed."""
FAREWELL_S = 10.0
"""Seconds in which the other processes may come to their end after the first one."""
WELL = (0, PREEMPTED, INTERRUPTED)
"""Exit statuses that end nobody else."""


@contextmanager
def started_by_this_one() -> Iterator[None]:
    """Processes that are started within know that it was this one."""
    os.environ[STARTED_BY] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[STARTED_BY]


def watch_started(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until all have ended well or left on request; at the first that has not, end all and this process."""
    while True:
        statuses = [process.poll() for process in processes]
        failed = next((rank for rank, status in enumerate(statuses, 1) if status not in (None, *WELL)), None)
        if failed is not None:
            break
        if None not in statuses:
            return
        time.sleep(LOOK_S)
    time.sleep(OWN_END_S)
    status = statuses[failed - 1] or 1
    for process in processes:
        process.kill()  # one that waits in a collective does not hear SIGTERM
    name = signal.Signals(-status).name if status < 0 else f"status {status}"
    end_now(
        f"process {failed} of this machine has ended with {name}, and all end with it",
        status=status if status > 0 else 128 - status,
    )


LAST_WATCH = """
import os, signal, sys, time
def there(number):
    try:
        os.kill(number, 0)
    except OSError:
        return False
    return True
first, seconds, numbers = int(sys.argv[1]), float(sys.argv[2]), [int(word) for word in sys.argv[3:]]
while os.getppid() == first:
    time.sleep(0.05)
until = time.monotonic() + seconds
while any(map(there, numbers)) and time.monotonic() < until:
    time.sleep(0.05)
for number in filter(there, numbers):
    os.kill(number, signal.SIGKILL)
"""
"""A program that gives processes some seconds to come to their end, from when the one that has started it is gone."""


def end_started(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """For the end of the first process: let the others come to theirs, then kill those that do not.

    They watch this one themselves, but not while they are stopped. After an error they wait for this one in a
    collective, and learn that it is lost when it is gone: then somebody else does the rest.
    """
    here = [process for process in processes if process.poll() is None]
    if here and hasattr(sys, "last_type") and os.name == "posix":  # an error that nobody caught
        numbers = map(str, [os.getpid(), FAREWELL_S, *(process.pid for process in here)])
        subprocess.Popen([sys.executable, "-c", LAST_WATCH, *numbers], start_new_session=True)
        return
    until = time.monotonic() + FAREWELL_S
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        time.sleep(0.05)
    for process in processes:
        process.kill()  # nothing happens to those that have ended


def end_with_first_process() -> None:
    """In a process that another has started: end when the first process is gone. Once for each process."""
    first = os.environ.pop(STARTED_BY, "")
    if first:
        threading.Thread(target=watch_first, args=(int(first),), daemon=True).start()


def watch_first(number: int) -> None:
    """Wait until the process `number` is no longer the parent of this one, and end this one."""
    while os.getppid() == number:
        time.sleep(LOOK_S)
    time.sleep(FAREWELL_S)
    end_now("the first process of this machine has ended, and this one ends with it", status=1)


def end_now(reason: str, *, status: int) -> None:
    """Say why, and end; the main thread may wait in a collective for ever, so that it cannot be asked."""
    print(f"dino-lightning: {reason}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)
