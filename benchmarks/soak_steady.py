"""A run that nothing hits, beside those of `benchmarks/soak.py`, as long as all of them: what grows slowly shows here.

The runs that are hit live for minutes, in which a program still warms up. This one has one process for hours.
"""

import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soak_measures as measures

EVERY = 60.0
"""Seconds between measurements."""
MEASURES = {
    "rss_main": "memory of the first process (RSS, MiB)",
    "anonymous": "memory of all processes that no file backs (MiB)",
    "shared": "shared memory (PSS, MiB)",
    "handles_main": "open handles of the first process",
    "handles": "open handles of all processes",
    "threads_main": "threads of the first process",
    "threads": "threads of all processes",
    "processes": "processes",
}
FLAT = {"rss_main": 0.01, "anonymous": 0.01}
"""Share of the mean by which memory may grow in an hour and still be flat; of all else it is one."""


@dataclass
class Steady:
    """The process of that run, and what was measured of it."""

    process: subprocess.Popen[bytes]
    marker: str
    folder: Path
    temporary: Path
    began: float = field(default_factory=time.time)
    due: float = 0.0
    samples: list[dict[str, Any]] = field(default_factory=list)
    to_exit: float | None = None

    def measure(self) -> None:
        """Once a minute."""
        now = time.time()
        if now < self.due or self.process.poll() is not None:
            return
        self.due = now + EVERY
        seen = measures.sample(
            self.process.pid, self.marker, folder=self.folder, temporary=self.temporary, seconds=now - self.began
        )
        if seen is not None:
            self.samples.append(measures.plain(seen))

    def end(self) -> list[str]:
        """Send SIGTERM and wait; what is wrong with how it ended."""
        if self.process.poll() is not None:
            return [f"the run left alone ended by itself, with status {self.process.returncode}"]
        began = time.time()
        self.process.terminate()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return ["the run left alone did not end within 60 s of SIGTERM"]
        self.to_exit = round(time.time() - began, 1)
        wrong = measures.wrong_rows(measures.rows_of(self.folder), whole=True)
        if self.process.returncode != 75:
            wrong.append(f"status {self.process.returncode} instead of 75")
        return [f"the run left alone: {what}" for what in wrong + self.grown()]

    def grown(self) -> list[str]:
        """Measures that are not flat."""
        return [
            f"{MEASURES[name]} grew by {found['per_hour']:+.2f} in an hour"
            for name, found in growth(self.samples).items()
            if not found["flat"]
        ]


def growth(samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By measure: the medians of the four quarters of the time, and the growth per hour from the second to the last."""
    quarter = len(samples) // 4
    if quarter < 2:
        return {}
    parts = [samples[place * quarter : (place + 1) * quarter] for place in range(4)]
    hours = (statistics.fmean(s["seconds"] for s in parts[3]) - statistics.fmean(s["seconds"] for s in parts[1])) / 3600
    found = {}
    for name in MEASURES:
        # A picture or a k-NN evaluation has files open for a moment: medians do not depend on when one looks.
        levels = [statistics.median(sample[name] for sample in part) for part in parts]
        per_hour = (levels[3] - levels[1]) / hours
        allowed = FLAT[name] * statistics.fmean(levels) if name in FLAT else 1.0
        found[name] = {
            "quarters": levels,
            "largest": max(s[name] for s in samples),
            "per_hour": per_hour,
            "flat": per_hour < allowed,
        }
    return found


def section(samples: list[dict[str, Any]], to_exit: float | None) -> list[str]:
    """Lines of the report."""
    found = growth(samples)
    if not found:
        return ["too short to tell"]
    lines = [
        f"{samples[-1]['seconds'] / 60:.0f} minutes and {samples[-1]['step']} steps of one process.",
        "Medians of the four quarters of the time. Flat: from the second quarter to the last it grows by less than "
        f"{FLAT['anonymous']:.0%} of the mean in an hour (shared memory by less than a MiB, handles, "
        "threads and processes by less than one).",
        "",
        "| | first | second | third | last | largest | per hour | flat |",
        "|" + "---|" * 8,
    ]
    for name, words in MEASURES.items():
        row = found[name]
        levels = " | ".join(f"{level:.1f}" for level in row["quarters"])
        lines.append(
            f"| {words} | {levels} | {row['largest']:.1f} | {row['per_hour']:+.2f} | "
            f"{'yes' if row['flat'] else '**no**'} |"
        )
    if to_exit is not None:
        lines += ["", f"SIGTERM ended it in {to_exit} s."]
    return lines
