"""The report of `benchmarks/soak.py`: legs, blows, what grew, what was left over."""

import json
import os
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from soak_steady import MEASURES, section

LEVELS = {"shm_used": "/dev/shm in use, all programs (MiB)", "folder": "folder of the run (MiB)"}


def write_report(folder: Path, seen: dict[str, Any]) -> None:
    """`report.json` and `report.md`, each whole or not at all."""
    for name, text in (("report.json", json.dumps(seen, indent=1)), ("report.md", markdown(seen))):
        draft = folder / f".{name}"
        draft.write_text(text)
        os.replace(draft, folder / name)


def markdown(seen: dict[str, Any]) -> str:
    """The report in words and tables."""
    legs, runs, failures = seen["legs"], seen["runs"], seen["failures"]
    ended = [run for run in runs if run["completed"] and run["number"]]
    same = [run for run in ended if not run["different"]]
    lines = [
        "# Soak",
        f"{seen['hours']:.2f} hours, {len(legs)} legs, {len(ended)} runs to their end, of which {len(same)} are equal "
        f"to the uninterrupted one to the last bit; {len(failures)} failures.",
        "",
        "Options: " + ", ".join(f"{key}={value}" for key, value in seen["options"].items()),
        "",
        "## Failures",
        *([f"- {line}" for line in failures] or ["none"]),
        "",
        "## Blows",
        *_blows(legs),
        "",
        "## A run left alone, beside those that were hit",
        *section(seen["steady"], seen["steady_exit"]),
        "",
        "## Levels from leg to leg",
        *_levels(legs),
        "",
        "## Runs",
        "| run | legs | completed | different | MiB at the end |",
        "|---|---|---|---|---|",
        *(
            f"| {run['number']} | {run['legs']} | {run['completed']} | {_none(run['different'])} | "
            f"{run.get('megabytes', '')} |"
            for run in runs
        ),
        "",
        "## Legs",
        "| leg | run | logger | loaders | from step | to step | seconds | ended by | went on through | status "
        "| s to exit | steps lost | left: processes | segments | temporary files |",
        "|" + "---|" * 15,
        *(
            f"| {i} | {leg['run']} | {leg['logger']} | {leg['workers']} | {leg['resumed']} | {leg['steps']} | "
            f"{leg['seconds']} | {leg['kind'] or 'itself'} | {', '.join(leg['survived'])} | {leg['code']} | "
            f"{_dash(leg['to_exit'])} | {_dash(leg['lost'])} | {len(leg['left_processes'])} | "
            f"{len(leg['left_segments'])} | {leg['left_files']} |"
            for i, leg in enumerate(legs)
        ),
        "",
    ]
    return "\n".join(lines)


def _blows(legs: list[dict[str, Any]]) -> list[str]:
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    through: dict[str, int] = defaultdict(int)
    for leg in legs:
        if leg["kind"]:
            by_kind[leg["kind"]].append(leg)
        for kind in leg["survived"]:
            through[kind] += 1
    lines = [
        "| by | legs ended | went on | status | s to exit: median, most | steps lost: median, most |",
        "|" + "---|" * 6,
    ]
    for kind in sorted(by_kind.keys() | through.keys()):
        hit = by_kind[kind]
        codes = ", ".join(sorted({str(leg["code"]) for leg in hit}))
        lines.append(
            f"| {kind} | {len(hit)} | {through[kind]} | {codes} | {_spread(hit, 'to_exit')} | {_spread(hit, 'lost')} |"
        )
    return lines


def _levels(legs: list[dict[str, Any]]) -> list[str]:
    lines = ["| | first leg | middle | last leg | largest |", "|" + "---|" * 5]
    names = {"rss_main": MEASURES["rss_main"], "handles": MEASURES["handles"], **LEVELS}
    for name, words in names.items():
        means = [(leg["logger"], statistics.fmean(s[name] for s in leg["samples"])) for leg in legs if leg["samples"]]
        means = [mean for mean in means if mean[0] == "csv"]
        if means:
            first, middle, last = (means[place][1] for place in (0, len(means) // 2, -1))
            most = max(s[name] for leg in legs for s in leg["samples"])
            lines.append(f"| {words} | {first:.1f} | {middle:.1f} | {last:.1f} | {most:.1f} |")
    return lines


def _spread(legs: list[dict[str, Any]], name: str) -> str:
    values = [leg[name] for leg in legs if leg[name] is not None]
    return f"{statistics.median(values):g}, {max(values):g}" if values else ""


def _none(value: Any) -> str:
    return "" if value is None else ", ".join(value) or "nothing"


def _dash(value: Any) -> str:
    return "" if value is None else str(value)
