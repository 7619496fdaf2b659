"""Processes of one machine that watch each other, so that none keeps running after another has failed.

`prctl(PR_SET_PDEATHSIG)` cannot replace it: SIGTERM does not reach a process that waits in a collective, and SIGKILL
would end the others before they can report the lost rank.
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
"""Environment variable of the started processes: the id of the process that started them."""
POLL_INTERVAL_S = 0.5
"""Time between two checks of the other processes."""
FIRST_EXIT_S = 3.0
"""Time in which the first process can end with its own message after another has failed."""
OTHERS_EXIT_S = 10.0
"""Time in which the other processes can end after the first one."""
SUCCESSFUL = (0, PREEMPTED, INTERRUPTED)
"""Exit statuses that do not end the other processes."""


@contextmanager
def started_by_this_one() -> Iterator[None]:
    """Tell the processes that are started within the block which process started them."""
    os.environ[STARTED_BY] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[STARTED_BY]


def watch_started(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until all have ended successfully or on request; if one fails, kill all and end this process."""
    while True:
        statuses = [process.poll() for process in processes]
        failed = next((rank for rank, status in enumerate(statuses, 1) if status not in (None, *SUCCESSFUL)), None)
        if failed is not None:
            break
        if None not in statuses:
            return
        time.sleep(POLL_INTERVAL_S)
    time.sleep(FIRST_EXIT_S)
    status = statuses[failed - 1] or 1
    for process in processes:
        process.kill()  # a process that waits in a collective does not handle SIGTERM
    name = signal.Signals(-status).name if status < 0 else f"status {status}"
    end_now(
        f"process {failed} of this machine has ended with {name}, and all end with it",
        status=status if status > 0 else 128 - status,
    )


CLEANUP_PROGRAM = """
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
deadline = time.monotonic() + seconds
while any(map(there, numbers)) and time.monotonic() < deadline:
    time.sleep(0.05)
for number in filter(there, numbers):
    os.kill(number, signal.SIGKILL)
"""
"""A program that waits for the end of its parent, gives processes some seconds to end, and kills the rest."""


def end_started(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """At the end of the first process, wait for the others to end, then kill those that have not.

    They watch this process, but cannot while they are stopped. After an error they wait for this process in a
    collective and notice only its end, so a separate program kills those that remain.
    """
    running = [process for process in processes if process.poll() is None]
    if running and hasattr(sys, "last_type") and os.name == "posix":  # an uncaught error
        numbers = map(str, [os.getpid(), OTHERS_EXIT_S, *(process.pid for process in running)])
        subprocess.Popen([sys.executable, "-c", CLEANUP_PROGRAM, *numbers], start_new_session=True)
        return
    deadline = time.monotonic() + OTHERS_EXIT_S
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        process.kill()  # has no effect on those that have ended


def end_with_first_process() -> None:
    """In a started process, end when the first process is gone. Later calls have no effect."""
    first = os.environ.pop(STARTED_BY, "")
    if first:
        threading.Thread(target=watch_first, args=(int(first),), daemon=True).start()


def watch_first(number: int) -> None:
    """Wait until the process `number` is no longer the parent of this one, then end this one."""
    while os.getppid() == number:
        time.sleep(POLL_INTERVAL_S)
    time.sleep(OTHERS_EXIT_S)
    end_now("the first process of this machine has ended, and this one ends with it", status=1)


def end_now(reason: str, *, status: int) -> None:
    """Print the reason and exit immediately: the main thread may wait in a collective and cannot be asked to end."""
    print(f"dino-lightning: {reason}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)
