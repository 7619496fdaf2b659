"""The report of `benchmarks/soak.py`: legs, blows, what grew, what was left over."""

import json
import math
import os
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

SETTLED = 20.0
"""Seconds at the beginning of a leg that are left out of slopes: the program still loads."""
GROWTH = {"rss_main": 0.01, "pss": 0.01, "shared": 0.05}
"""Share of the mean by which memory may grow in an hour and still be flat; of handles and threads it is one."""
SLOPES = {
    "rss_main": "memory of the first process (RSS, MiB)",
    "pss": "memory of all processes (PSS, MiB)",
    "shared": "of it shared memory (PSS, MiB)",
    "handles_main": "open handles of the first process",
    "handles": "open handles of all processes",
    "threads_main": "threads of the first process",
    "threads": "threads of all processes",
    "processes": "processes",
}
LEVELS = {"shm_used": "/dev/shm in use, all programs (MiB)", "folder": "folder of the run (MiB)"}


def write_report(folder: Path, seen: dict[str, Any]) -> None:
    """`report.json` and `report.md`, each whole or not at all."""
    seen = {**seen, "slopes": {name: slope_of(seen["legs"], name) for name in SLOPES}}
    for name, text in (("report.json", json.dumps(seen, indent=1)), ("report.md", markdown(seen))):
        draft = folder / f".{name}"
        draft.write_text(text)
        os.replace(draft, folder / name)


def slope_of(legs: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Growth per hour within legs, each about its own mean, and its standard error with legs as the independent parts.

    Flat is what does not grow by two standard errors, or by less than `GROWTH` even at two standard errors more.
    """
    square, product, parts, values = 0.0, 0.0, [], []
    for leg in legs:
        points = [(s["seconds"], s[name]) for s in leg["samples"] if s["seconds"] >= SETTLED]
        if len(points) < 3:
            continue
        mean_t, mean_y = (statistics.fmean(column) for column in zip(*points, strict=True))
        centred = [(t - mean_t, y - mean_y) for t, y in points]
        parts.append(centred)
        values += [y for _, y in points]
        square += sum(t * t for t, _ in centred)
        product += sum(t * y for t, y in centred)
    if len(parts) < 2:
        return {"legs": len(parts)}
    slope = product / square
    scores = [sum(t * (y - slope * t) for t, y in centred) for centred in parts]
    error = math.sqrt(sum(score * score for score in scores) * len(parts) / (len(parts) - 1)) / square
    mean, slope, error = statistics.fmean(values), slope * 3600, error * 3600
    allowed = GROWTH[name] * mean if name in GROWTH else 1.0
    flat = slope - 2 * error <= 0 or slope + 2 * error < allowed
    return {"legs": len(parts), "samples": len(values), "mean": mean, "largest": max(values), "per_hour": slope,
            "error": error, "flat": flat}  # fmt: skip


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
        f"## Growth within legs, from {SETTLED:.0f} s after their beginning",
        *_growth(seen["slopes"]),
        "",
        "## Levels from leg to leg",
        *_levels(legs),
        "",
        "## Runs",
        "| run | legs | completed | different | MiB at the end |",
        "|---|---|---|---|---|",
        *(f"| {run['number']} | {run['legs']} | {run['completed']} | {_none(run['different'])} | "
          f"{run.get('megabytes', '')} |" for run in runs),
        "",
        "## Legs",
        "| leg | run | logger | loaders | from step | to step | seconds | ended by | went on through | status "
        "| s to exit | steps lost | left: processes | segments | temporary files |",
        "|" + "---|" * 15,
        *(f"| {i} | {leg['run']} | {leg['logger']} | {leg['workers']} | {leg['resumed']} | {leg['steps']} | "
          f"{leg['seconds']} | {leg['kind'] or 'itself'} | {', '.join(leg['survived'])} | {leg['code']} | "
          f"{_dash(leg['to_exit'])} | {_dash(leg['lost'])} | {len(leg['left_processes'])} | "
          f"{len(leg['left_segments'])} | {leg['left_files']} |" for i, leg in enumerate(legs)),
        "",
    ]  # fmt: skip
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
        lines.append(f"| {kind} | {len(hit)} | {through[kind]} | {codes} | {_spread(hit, 'to_exit')} | "
                     f"{_spread(hit, 'lost')} |")  # fmt: skip
    return lines


def _growth(slopes: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "Flat: does not grow by two standard errors; or, even at two standard errors more, by less than "
        f"{GROWTH['pss']:.0%} of the mean in an hour (shared memory {GROWTH['shared']:.0%}; handles, threads and "
        "processes: one).",
        "",
        "| | mean | largest | per hour | standard error | flat |",
        "|" + "---|" * 6,
    ]
    for name, words in SLOPES.items():
        found = slopes[name]
        if "per_hour" in found:
            lines.append(f"| {words} | {found['mean']:.1f} | {found['largest']:.1f} | {found['per_hour']:+.2f} | "
                         f"{found['error']:.2f} | {'yes' if found['flat'] else '**no**'} |")  # fmt: skip
    return lines


def _levels(legs: list[dict[str, Any]]) -> list[str]:
    lines = ["| | first leg | middle | last leg | largest |", "|" + "---|" * 5]
    names = {"rss_main": SLOPES["rss_main"], "handles": SLOPES["handles"], **LEVELS}
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
