"""Ways to end or to hinder a run from outside: `benchmarks/soak.py`."""

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import soak_measures as measures

KINDS = ("TERM", "KILL", "loader", "INT", "USR1", "disk", "STOP", "TERM all", "USR1 all")
"""Signals to the first process, SIGKILL to a loader process, a disk that is full for a while. `all` means every process
of the run, as schedulers do; INT goes to the group of processes, as from a terminal."""
LEAVES = {"TERM": 75, "TERM all": 75, "USR1": 75, "USR1 all": 75, "INT": 130, "KILL": -9}
"""Kinds that must end a run, and its exit status then."""
ORDERLY = ("TERM", "TERM all", "USR1", "USR1 all", "INT")
HOLD, STOPPED = 45.0, 25.0
"""Seconds for which the disk is full, longer than from one checkpoint to the next; for which a run is stopped."""
RESULTS_S = 10.0
"""Seconds from the last step to the end of a run: a signal in them changes nothing, and the status is 0."""
EXIT_LIMIT, LATER = 90.0, 20.0
"""Seconds within which a run must end; after which it has gone on in spite of a blow."""


class Blows:
    """Each kind once, in an order of chance, then each again."""

    def __init__(self, chance: random.Random) -> None:
        self.random = chance
        self._left: list[str] = []

    def next_kind(self, main: int, *, disk: bool) -> str:
        """What comes next for a run whose first process is `main`."""
        while True:
            self._left = self._left or self.random.sample(KINDS, len(KINDS))
            for kind in self._left:
                if (kind != "disk" or disk) and (kind != "loader" or measures.loaders_of(main)):
                    self._left.remove(kind)
                    return kind
            self._left = []

    def strike(self, kind: str, process: subprocess.Popen[bytes], marker: str, *, disk: Path) -> bool:
        """Whether the run has ended of it."""
        if kind == "disk":
            fill(disk, process)
        elif kind == "STOP":
            signal_all(marker, signal.SIGSTOP)
            time.sleep(STOPPED)
            signal_all(marker, signal.SIGCONT)
        elif kind == "loader":
            with suppress(IndexError, ProcessLookupError):  # those of a k-NN evaluation end by themselves
                os.kill(self.random.choice(measures.loaders_of(process.pid)), signal.SIGKILL)
        elif kind == "INT":
            os.killpg(process.pid, signal.SIGINT)
        elif kind.endswith("all"):
            signal_all(marker, getattr(signal, f"SIG{kind.split()[0]}"))
        else:
            process.send_signal(getattr(signal, f"SIG{kind}"))
        try:
            process.wait(EXIT_LIMIT if kind in LEAVES else LATER)
        except subprocess.TimeoutExpired:
            return False
        return True


def fill(disk: Path, process: subprocess.Popen[bytes]) -> None:
    """Leave no byte on a disk for `HOLD` seconds, or until the process has ended."""
    filler, size = disk / "filler", 2**20
    with filler.open("wb", buffering=0) as file:
        while size:
            try:
                file.write(b"\0" * size)
            except OSError:
                size //= 2
    until = time.time() + HOLD
    while time.time() < until and process.poll() is None:
        time.sleep(0.1)
    filler.unlink()


def signal_all(marker: str, number: int) -> None:
    """Send a signal to all processes that have a mark."""
    for pid in measures.processes_of(marker):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
