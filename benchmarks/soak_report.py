"""Writes the report of `benchmarks/soak.py`."""

import json
import os
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from soak_steady import MEASURES, section

LEVELS = {
    "rss_main": MEASURES["rss_main"],
    "handles": MEASURES["handles"],
    "shm_used": "/dev/shm used by all programs (MiB)",
    "folder": "folder of the run (MiB)",
}


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Write `report.json` and `report.md` atomically."""
    for name, text in (("report.json", json.dumps(results, indent=1)), ("report.md", markdown(results))):
        draft = folder / f".{name}"
        draft.write_text(text)
        os.replace(draft, folder / name)


def markdown(results: dict[str, Any]) -> str:
    """The report as Markdown."""
    attempts, runs, failures = results["attempts"], results["runs"], results["failures"]
    finished = [run for run in runs if run["completed"] and run["number"]]
    identical = [run for run in finished if not run["different"]]
    lines = [
        "# Soak test",
        f"{results['hours']:.2f} hours, {len(attempts)} attempts, {len(failures)} failures. {len(finished)} runs "
        f"finished, and {len(identical)} of them are bit-identical to the uninterrupted run.",
        "",
        "Options: " + ", ".join(f"{key}={value}" for key, value in results["options"].items()),
        "",
        "## Failures",
        *([f"- {line}" for line in failures] or ["none"]),
        "",
        "## Events",
        *_events(attempts),
        "",
        "## Undisturbed run",
        *section(results["steady"], results["steady_exit"]),
        "",
        "## Resources over all attempts",
        *_levels(attempts),
        "",
        "## Runs",
        "| run | attempts | finished | differences | MiB at the end |",
        "|---|---|---|---|---|",
        *(
            f"| {run['number']} | {run['attempts']} | {run['completed']} | {_differences(run['different'])} | "
            f"{run.get('megabytes', '')} |"
            for run in runs
        ),
        "",
        "## Attempts",
        "| attempt | run | logger | loader processes | from step | to step | seconds | ended by | tolerated | status "
        "| seconds to the exit | repeated steps | left: processes | segments | temporary files |",
        "|" + "---|" * 15,
        *(
            f"| {i} | {attempt['run']} | {attempt['logger']} | {attempt['workers']} | {attempt['resumed']} | "
            f"{attempt['steps']} | {attempt['seconds']} | {attempt['event'] or ''} | "
            f"{', '.join(attempt['tolerated'])} | {attempt['code']} | {_or_empty(attempt['to_exit'])} | "
            f"{_or_empty(attempt['lost'])} | {len(attempt['left_processes'])} | {len(attempt['left_segments'])} | "
            f"{attempt['left_files']} |"
            for i, attempt in enumerate(attempts)
        ),
        "",
    ]
    return "\n".join(lines)


def _events(attempts: list[dict[str, Any]]) -> list[str]:
    by_event: dict[str, list[dict[str, Any]]] = defaultdict(list)
    tolerated: dict[str, int] = defaultdict(int)
    for attempt in attempts:
        if attempt["event"]:
            by_event[attempt["event"]].append(attempt)
        for event in attempt["tolerated"]:
            tolerated[event] += 1
    lines = [
        "| event | ended the run | tolerated | status | seconds to the exit: median, maximum "
        "| repeated steps: median, maximum |",
        "|" + "---|" * 6,
    ]
    for event in sorted(by_event.keys() | tolerated.keys()):
        ended = by_event[event]
        codes = ", ".join(sorted({str(attempt["code"]) for attempt in ended}))
        lines.append(
            f"| {event} | {len(ended)} | {tolerated[event]} | {codes} | {_spread(ended, 'to_exit')} | "
            f"{_spread(ended, 'lost')} |"
        )
    return lines


def _levels(attempts: list[dict[str, Any]]) -> list[str]:
    lines = ["| | first attempt | middle | last attempt | maximum |", "|" + "---|" * 5]
    for name, label in LEVELS.items():
        sampled = [attempt["samples"] for attempt in attempts if attempt["samples"] and attempt["logger"] == "csv"]
        if sampled:
            means = [statistics.fmean(sample[name] for sample in samples) for samples in sampled]
            first, middle, last = (means[i] for i in (0, len(means) // 2, -1))
            maximum = max(sample[name] for attempt in attempts for sample in attempt["samples"])
            lines.append(f"| {label} | {first:.1f} | {middle:.1f} | {last:.1f} | {maximum:.1f} |")
    return lines


def _spread(attempts: list[dict[str, Any]], name: str) -> str:
    values = [attempt[name] for attempt in attempts if attempt[name] is not None]
    return f"{statistics.median(values):g}, {max(values):g}" if values else ""


def _differences(differences: list[str] | None) -> str:
    return "" if differences is None else ", ".join(differences) or "none"


def _or_empty(value: Any) -> str:
    return "" if value is None else str(value)
