"""The undisturbed run of `benchmarks/soak.py`, which detects memory and other resources that grow slowly.

The other runs are killed after minutes, while a program still warms up. This one keeps one process for hours.
"""

import statistics
import subprocess
import time
from dataclasses import dataclass, field
from typing import Any

import soak_measures as measures
from soak_run import RunProcess

SAMPLE_INTERVAL_S = 60.0
MEASURES = {
    "rss_main": "memory of the first process (RSS, MiB)",
    "anonymous": "anonymous memory of all processes (MiB)",
    "shared": "shared memory (PSS, MiB)",
    "handles_main": "open file handles of the first process",
    "handles": "open file handles of all processes",
    "threads_main": "threads of the first process",
    "threads": "threads of all processes",
    "processes": "processes",
}
MAX_GROWTH = {"rss_main": 0.01, "anonymous": 0.01}
"""Limit of the growth per hour, as a share of the mean; for all other measures the limit is 1 in their unit."""


@dataclass
class Steady:
    """The undisturbed run and its measurements."""

    run: RunProcess
    began: float = field(default_factory=time.time)
    due: float = 0.0
    samples: list[dict[str, Any]] = field(default_factory=list)
    to_exit: float | None = None

    def measure(self) -> None:
        """Measure if the last measurement is a minute old."""
        now = time.time()
        if now < self.due or self.run.process.poll() is not None:
            return
        self.due = now + SAMPLE_INTERVAL_S
        sample = measures.sample(self.run, seconds=now - self.began)
        if sample is not None:
            self.samples.append(measures.as_json(sample))

    def end(self) -> list[str]:
        """Send SIGTERM and wait for the exit; returns the failures."""
        process = self.run.process
        if process.poll() is not None:
            return [f"the undisturbed run ended by itself, with status {process.returncode}"]
        began = time.time()
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            return ["the undisturbed run did not end within 60 s of SIGTERM"]
        self.to_exit = round(time.time() - began, 1)
        failures = measures.wrong_rows(measures.rows_of(self.run.folder), finished=True)
        if process.returncode != 75:
            failures.append(f"status {process.returncode} instead of 75")
        return [f"the undisturbed run: {failure}" for failure in failures + self.grown()]

    def grown(self) -> list[str]:
        """Messages about the measures that grow too fast."""
        return [
            f"{MEASURES[name]} grew by {row['per_hour']:+.2f} per hour"
            for name, row in growth(self.samples).items()
            if not row["flat"]
        ]


def growth(samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each measure, the medians of the four quarters of the time and the growth from second to last, per hour."""
    quarter = len(samples) // 4
    if quarter < 2:
        return {}
    parts = [samples[i * quarter : (i + 1) * quarter] for i in range(4)]
    hours = (statistics.fmean(s["seconds"] for s in parts[3]) - statistics.fmean(s["seconds"] for s in parts[1])) / 3600
    rows = {}
    for name in MEASURES:
        # Pictures and k-NN evaluations open files for a moment; the median does not depend on when we measure.
        levels = [statistics.median(sample[name] for sample in part) for part in parts]
        per_hour = (levels[3] - levels[1]) / hours
        limit = MAX_GROWTH[name] * statistics.fmean(levels) if name in MAX_GROWTH else 1.0
        rows[name] = {
            "quarters": levels,
            "largest": max(s[name] for s in samples),
            "per_hour": per_hour,
            "flat": per_hour < limit,
        }
    return rows


def section(samples: list[dict[str, Any]], to_exit: float | None) -> list[str]:
    """Lines of the report."""
    rows = growth(samples)
    if not rows:
        return ["The time was too short."]
    lines = [
        f"{samples[-1]['seconds'] / 60:.0f} minutes and {samples[-1]['step']} steps of one process.",
        "Medians of the four quarters of the time. A measure is flat if it grows by less than "
        f"{MAX_GROWTH['anonymous']:.0%} of its mean per hour from the second quarter to the last (shared memory: by "
        "less than 1 MiB; handles, threads and processes: by less than one).",
        "",
        "| | first | second | third | last | maximum | change from second to last, per hour | flat |",
        "|" + "---|" * 8,
    ]
    for name, label in MEASURES.items():
        row = rows[name]
        levels = " | ".join(f"{level:.1f}" for level in row["quarters"])
        lines.append(
            f"| {label} | {levels} | {row['largest']:.1f} | {row['per_hour']:+.2f} | "
            f"{'yes' if row['flat'] else '**no**'} |"
        )
    if to_exit is not None:
        lines += ["", f"SIGTERM ended it in {to_exit} s."]
    return lines
