"""Measures a run of `benchmarks/soak.py` from outside: its processes, its files and the rows of its log."""

import csv
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from soak_run import RunProcess

MIB = 2**20
SHM = Path("/dev/shm")


@dataclass
class Sample:
    """State of a run at one moment. Memory is in MiB; values without `_main` are sums over all processes of the run."""

    seconds: float
    """Since the start of the attempt."""
    step: int
    rss_main: float
    anonymous: float
    """Memory without a file; pages that a forked loader process shares with its parent count in both. PSS would rise
    whenever another program exits that shared libraries with the run."""
    shared: float
    """Shared memory, divided by the number of processes that share it (PSS)."""
    handles: int
    handles_main: int
    threads: int
    threads_main: int
    processes: int
    shm_used: float
    """Used part of /dev/shm, by all programs on the machine."""
    folder: float
    """Size of the run's folder."""
    temporary: int
    """Number of files in the run's folder for temporary files."""


@dataclass
class Attempt:
    """A run from a start to the next exit of its first process."""

    run: int
    began: float
    logger: str
    workers: int
    resumed: int | None = None
    """The step from which training was resumed; None if it ended before training started."""
    event: str | None = None
    """The event that ended it; None if it finished."""
    tolerated: list[str] = field(default_factory=list)
    """Events that did not end it."""
    code: int | None = None
    seconds: float = 0.0
    to_exit: float | None = None
    """Seconds from the event to the exit."""
    steps: int = 0
    """Steps of the run that were done at the exit."""
    lost: int | None = None
    """Those of them that the next attempt repeated."""
    left_processes: list[str] = field(default_factory=list)
    left_segments: list[str] = field(default_factory=list)
    left_files: int = 0
    """Number of temporary files."""
    samples: list[dict[str, Any]] = field(default_factory=list)


def processes_of(marker: str) -> list[int]:
    """Living processes with `marker` in their environment, whatever their parent is now."""
    pids = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                environment = Path(f"/proc/{entry}/environ").read_bytes()
                if marker.encode() in environment and _state(int(entry)) not in "ZX":
                    pids.append(int(entry))
            except OSError:
                continue
    return pids


def loaders_of(main: int) -> list[int]:
    """Loader processes: children of the first process that were forked from it and therefore share its command line."""
    try:
        command = Path(f"/proc/{main}/cmdline").read_bytes()
        children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
    except OSError:
        return []
    same = []
    for child in children:
        try:
            if Path(f"/proc/{child}/cmdline").read_bytes() == command:
                same.append(int(child))
        except OSError:
            continue
    return same


def sample(run: RunProcess, *, seconds: float) -> Sample | None:
    """Measure a run; None if its first process has ended."""
    total = {"Anonymous": 0, "Pss_Shmem": 0}
    handles = threads = count = 0
    first: dict[str, Any] = {}
    for pid in processes_of(run.marker):
        try:
            memory = _memory(pid)
            status = Path(f"/proc/{pid}/status").read_text()
            opened = len(os.listdir(f"/proc/{pid}/fd"))
        except OSError:
            continue
        own_threads = int(status.split("Threads:")[1].split()[0])
        total = {key: value + memory.get(key, 0) for key, value in total.items()}
        handles, threads, count = handles + opened, threads + own_threads, count + 1
        if pid == run.process.pid:
            first = {"rss_main": memory.get("Rss", 0) / 1024, "handles_main": opened, "threads_main": own_threads}
    if not first:
        return None
    shm = os.statvfs(SHM)
    return Sample(
        seconds=round(seconds, 1),
        step=last_step(run.folder),
        anonymous=total["Anonymous"] / 1024,
        shared=total["Pss_Shmem"] / 1024,
        handles=handles,
        threads=threads,
        processes=count,
        shm_used=(shm.f_blocks - shm.f_bfree) * shm.f_frsize / MIB,
        folder=size_of(run.folder),
        temporary=count_of(run.temporary),
        **first,
    )


def as_json(sample: Sample) -> dict[str, Any]:
    """The rounded values by name."""
    return {key: round(value, 2) for key, value in asdict(sample).items()}


def segments() -> set[str]:
    """Names of the shared memory segments in /dev/shm."""
    return set(os.listdir(SHM)) if SHM.is_dir() else set()


def segments_of(names: set[str], pids: set[int]) -> list[str]:
    """The segments of these processes: PyTorch writes the process id into the name."""
    return sorted(name for name in names if any(f"_{pid}_" in name for pid in pids))


def size_of(folder: Path) -> float:
    """Size of a folder's files in MiB."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512 if path.is_file() else 0
        except OSError:
            continue
    return total / MIB


def count_of(folder: Path) -> int:
    """Number of files in a folder, without the sockets that PyTorch's loader processes leave behind."""
    return sum(1 for path in folder.rglob("*") if path.is_file())


def rows_of(folder: Path) -> list[dict[str, str]]:
    """Rows of `metrics.csv`; empty if there is no file."""
    try:
        with (folder / "metrics.csv").open() as file:
            return list(csv.DictReader(file))
    except OSError:
        return []


def last_step(folder: Path) -> int:
    """Number of optimizer steps in `metrics.csv`."""
    steps = [_number(row.get("step")) for row in rows_of(folder)[-3:]]
    return 1 + max(steps, default=-1)


def wrong_rows(rows: list[dict[str, str]], *, finished: bool) -> list[str]:
    """Steps with a loss that are missing, duplicated or out of order.

    The last row of a run that is not `finished` may be cut off and is then ignored.
    """
    steps = [_number(row.get("step")) for row in rows if row.get("train/loss")]
    if not finished and steps and steps[-1] != len(steps) - 1:
        steps.pop()
    wrong = [f"step {i} missing or duplicated: row {i} has step {s}" for i, s in enumerate(steps) if s != i]
    return wrong[:3]


def _number(text: str | None) -> int:
    try:
        return int(text or -1)
    except ValueError:
        return -1


def _memory(pid: int) -> dict[str, int]:
    """Memory of a process in KiB by kind."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) for line in lines}


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def command_of(pid: int) -> str:
    """Command line of a process, or its id if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:80]
    except OSError:
        return str(pid)
