"""The events with which `benchmarks/soak.py` disturbs a run."""

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import soak_measures as measures
from soak_run import RunProcess

KINDS = ("TERM", "KILL", "loader", "INT", "USR1", "disk", "STOP", "TERM all", "USR1 all")
"""Signals to the first process, SIGKILL to a loader process, a disk that is full for a while. `all` means every process
of the run, as with schedulers; INT goes to the process group, as from a terminal."""
EXIT_STATUSES = {"TERM": 75, "TERM all": 75, "USR1": 75, "USR1 all": 75, "INT": 130, "KILL": -9}
"""The events that must end a run, and its exit status."""
GRACEFUL = ("TERM", "TERM all", "USR1", "USR1 all", "INT")
"""The events after which a run saves a checkpoint before it exits."""
FULL_DISK_S = 45.0
"""How long the disk is full: longer than the interval between checkpoints."""
STOPPED_S = 25.0
"""How long a run is stopped."""
RESULTS_S = 10.0
"""Duration of the end of a run, after its last step: a signal during this time has no effect, and the status is 0."""
EXIT_LIMIT_S = 90.0
"""Time within which a run must end after an event that must end it."""
TOLERATED_S = 20.0
"""A run that has not ended this long after another event has tolerated it."""


class Events:
    """Each kind of event once, in random order, then all of them again in another random order."""

    def __init__(self, generator: random.Random) -> None:
        self.random = generator
        self._left: list[str] = []

    def next_kind(self, main: int, *, disk: bool) -> str:
        """The next possible event for a run whose first process is `main`; `disk`: whether the disk can be filled."""
        while True:
            self._left = self._left or self.random.sample(KINDS, len(KINDS))
            for kind in self._left:
                if (kind != "disk" or disk) and (kind != "loader" or measures.loaders_of(main)):
                    self._left.remove(kind)
                    return kind
            self._left = []

    def cause(self, kind: str, run: RunProcess, *, disk: Path) -> bool:
        """Cause an event and wait; returns whether the run has ended."""
        process, marker = run.process, run.marker
        if kind == "disk":
            fill(disk, process)
        elif kind == "STOP":
            signal_all(marker, signal.SIGSTOP)
            time.sleep(STOPPED_S)
            signal_all(marker, signal.SIGCONT)
        elif kind == "loader":
            with suppress(IndexError, ProcessLookupError):  # the loader processes of a k-NN evaluation may have ended
                os.kill(self.random.choice(measures.loaders_of(process.pid)), signal.SIGKILL)
        elif kind == "INT":
            os.killpg(process.pid, signal.SIGINT)
        elif kind.endswith("all"):
            signal_all(marker, getattr(signal, f"SIG{kind.split()[0]}"))
        else:
            process.send_signal(getattr(signal, f"SIG{kind}"))
        try:
            process.wait(EXIT_LIMIT_S if kind in EXIT_STATUSES else TOLERATED_S)
        except subprocess.TimeoutExpired:
            return False
        return True


def fill(disk: Path, process: subprocess.Popen[bytes]) -> None:
    """Fill a disk for `FULL_DISK_S` seconds, or until the process has ended."""
    filler, size = disk / "filler", 2**20
    with filler.open("wb", buffering=0) as file:
        while size:
            try:
                file.write(b"\0" * size)
            except OSError:
                size //= 2
    until = time.time() + FULL_DISK_S
    while time.time() < until and process.poll() is None:
        time.sleep(0.1)
    filler.unlink()


def signal_all(marker: str, number: int) -> None:
    """Send a signal to all processes with `marker` in their environment."""
    for pid in measures.processes_of(marker):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
