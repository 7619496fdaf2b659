"""What `benchmarks/soak.py` sees of a run from outside: its processes, its files and the rows of its log."""

import csv
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MIB = 2**20
SHM = Path("/dev/shm")


@dataclass
class Sample:
    """A run at a moment; memory in MiB, of all its processes together unless it says otherwise."""

    seconds: float
    """Since the leg began."""
    step: int
    rss_main: float
    anonymous: float
    """Of no file; pages that a loader process shares with its parent since the fork count in both. Not PSS: that rises
    when another program ends that shared libraries with the run."""
    shared: float
    """In shared memory, a part of what is shared by several (PSS)."""
    handles: int
    handles_main: int
    threads: int
    threads_main: int
    processes: int
    shm_used: float
    """Of /dev/shm, by all programs of the machine."""
    folder: float
    """Size of the run's folder."""
    temporary: int
    """Files in the run's folder for temporary files."""


@dataclass
class Leg:
    """One process of a run, from its start to its exit."""

    run: int
    began: float
    logger: str
    workers: int
    resumed: int | None = None
    """Step it went on from; None where it ended before it began to train."""
    kind: str | None = None
    """What ended it; None where it came to its own end."""
    survived: list[str] = field(default_factory=list)
    """What it has gone on through."""
    code: int | None = None
    seconds: float = 0.0
    to_exit: float | None = None
    """Seconds from the signal to the exit."""
    steps: int = 0
    """Steps done when it had ended."""
    lost: int | None = None
    """Of them, those that the next leg did again."""
    left_processes: list[str] = field(default_factory=list)
    left_segments: list[str] = field(default_factory=list)
    left_files: int = 0
    """Temporary files."""
    samples: list[dict[str, Any]] = field(default_factory=list)


def processes_of(marker: str) -> list[int]:
    """Processes that live and have `marker` in their environment, whoever is their parent by now."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                environment = Path(f"/proc/{entry}/environ").read_bytes()
                if marker.encode() in environment and _state(int(entry)) not in "ZX":
                    found.append(int(entry))
            except OSError:
                continue
    return found


def loaders_of(main: int) -> list[int]:
    """Loader processes: children of the main one that were forked from it, so that they share its command line."""
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


def sample(main: int, marker: str, *, folder: Path, temporary: Path, seconds: float) -> Sample | None:
    """Measure a run whose first process is `main`; None where that one has ended."""
    total = {"Anonymous": 0, "Pss_Shmem": 0}
    handles = threads = count = 0
    own: dict[str, Any] = {}
    for pid in processes_of(marker):
        try:
            memory = _memory(pid)
            status = Path(f"/proc/{pid}/status").read_text()
            opened = len(os.listdir(f"/proc/{pid}/fd"))
        except OSError:
            continue
        here = int(status.split("Threads:")[1].split()[0])
        total = {key: value + memory.get(key, 0) for key, value in total.items()}
        handles, threads, count = handles + opened, threads + here, count + 1
        if pid == main:
            own = {"rss_main": memory.get("Rss", 0) / 1024, "handles_main": opened, "threads_main": here}
    if not own:
        return None
    shm = os.statvfs(SHM)
    return Sample(
        seconds=round(seconds, 1),
        step=last_step(folder),
        anonymous=total["Anonymous"] / 1024,
        shared=total["Pss_Shmem"] / 1024,
        handles=handles,
        threads=threads,
        processes=count,
        shm_used=(shm.f_blocks - shm.f_bfree) * shm.f_frsize / MIB,
        folder=size_of(folder),
        temporary=count_of(temporary),
        **own,
    )


def plain(measured: Sample) -> dict[str, Any]:
    """For JSON."""
    return {key: round(value, 2) for key, value in asdict(measured).items()}


def segments() -> set[str]:
    """Names in /dev/shm."""
    return set(os.listdir(SHM)) if SHM.is_dir() else set()


def segments_of(names: set[str], pids: set[int]) -> list[str]:
    """Those of some processes: PyTorch puts the number of the process into the name."""
    return sorted(name for name in names if any(f"_{pid}_" in name for pid in pids))


def size_of(folder: Path) -> float:
    """MiB of a folder's files."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512 if path.is_file() else 0
        except OSError:
            continue
    return total / MIB


def count_of(folder: Path) -> int:
    """Files in a folder; sockets, which PyTorch's loader processes leave behind, not among them."""
    return sum(1 for path in folder.rglob("*") if path.is_file())


def rows_of(folder: Path) -> list[dict[str, str]]:
    """Rows of `metrics.csv`; none where there is no file."""
    try:
        with (folder / "metrics.csv").open() as file:
            return list(csv.DictReader(file))
    except OSError:
        return []


def last_step(folder: Path) -> int:
    """Optimizer steps of which `metrics.csv` has the loss."""
    steps = [_number(row.get("step")) for row in rows_of(folder)[-3:]]
    return 1 + max(steps, default=-1)


def wrong_rows(rows: list[dict[str, str]], *, whole: bool) -> list[str]:
    """What is wrong with the steps that have a loss: missing, doubled or out of order. A last row that was cut off is
    not counted where the run goes on (`whole=False`)."""
    steps = [_number(row.get("step")) for row in rows if row.get("train/loss")]
    if not whole and steps and steps[-1] != len(steps) - 1:
        steps.pop()
    wrong = [f"step {i} missing or doubled: row {i} has step {s}" for i, s in enumerate(steps) if s != i]
    return wrong[:3]


def _number(text: str | None) -> int:
    try:
        return int(text or -1)
    except ValueError:
        return -1


def _memory(pid: int) -> dict[str, int]:
    """KiB by kind."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) for line in lines}


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def command_of(pid: int) -> str:
    """Name of a process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:80]
    except OSError:
        return str(pid)
