"""The table of a sweep with the paper's figures, for the terminal and as Markdown."""

import json
import math
import re
from statistics import mean, stdev

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from dino_lightning.report.sweeps.jobs import Job, Row
from dino_lightning.report.sweeps.published import PUBLISHED

COLUMNS = ("", "n", "k-NN, %", "paper's\nk-NN / linear", "loss", "entropy", "KL", "status")
"""Run; number of seeds; mean and deviation over seeds; the paper's figures; last loss, entropy of the teacher and its
divergence from the student (nats); status."""


def row_cells(row: Row) -> list[str]:
    """The row's text for each of `COLUMNS`; empty for missing figures."""
    jobs = row.evaluated_jobs
    published = PUBLISHED.get(row.experiment)
    return [
        row.name,
        str(len(jobs)),
        mean_and_deviation([job.run.knn for job in jobs]),
        published.figures if published else "",
        _mean([job.run.last_value("train/loss_epoch", "train/loss") for job in jobs]),
        _mean([job.run.last_value("collapse/teacher_entropy") for job in jobs]),
        _mean([job.run.last_value("collapse/teacher_student_kl") for job in jobs]),
        row.status,
    ]


def notes(rows: list[Row]) -> list[str]:
    """Baselines for all rows: the untrained network, and the entropy of a uniform output."""
    jobs = [job for row in rows for job in row.jobs]
    untrained: dict[str, dict[int | None, float]] = {}
    for job in jobs:
        value = job.run.number("knn_top1_untrained")
        if value is not None:
            untrained.setdefault(_network_and_images(job), {}).setdefault(job.seed, value)
    figures = [
        f"k-NN {mean_and_deviation(list(values.values()))} % (n = {len(values)})" for values in untrained.values()
    ]
    lines = [f"untrained network: {' or '.join(dict.fromkeys(figures))}"] if figures else []
    widths = sorted(
        {K for job in jobs if job.run.last_value("collapse/teacher_entropy") is not None and (K := prototypes(job))}
    )
    if len(widths) == 1:
        lines.append(f"uniform output: entropy ln {widths[0]} = {math.log(widths[0]):.2f}")
    return lines + _best(rows)


def _best(rows: list[Row]) -> list[str]:
    """The best of the rows that share their experiment with other rows."""
    searched = [row for row in rows if sum(other.experiment == row.experiment for other in rows) > 1]
    figures = [([knn for job in row.evaluated_jobs if (knn := job.run.knn) is not None], row) for row in searched]
    known = [(mean(values), row) for values, row in figures if values]
    if not known:
        return []
    value, best = max(known, key=lambda pair: pair[0])
    return [
        f"best: k-NN {value:.1f} % of {best.name} (folder {', '.join(job.run.name for job in best.evaluated_jobs)})"
    ]


def prototypes(job: Job) -> int | None:
    """The number of prototypes K, if the method has any."""
    K = job.run.setting("method.out_dim")
    return K if isinstance(K, int) and K > 1 else None


def mean_and_deviation(values: list[float | None]) -> str:
    """Mean and, for at least two values, the sample's standard deviation."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{mean(known):.1f}" + (f" ± {stdev(known):.1f}" if len(known) > 1 else "")


def terminal_table(rows: list[Row]) -> Table:
    """The table for the terminal."""
    # Without lines between the columns, the figures fit into 80 characters; names and states may wrap.
    table = Table(caption=escape("\n".join(notes(rows))) or None, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    titles, lines = table_cells(rows)
    for index, title in enumerate(titles):
        figure = 0 < index < len(titles) - 1
        broken = re.sub(r"([._])(?=\w)", r"\1\n", title) if title in rows[0].settings else title
        least = len(title) if not figure else None
        table.add_column(
            broken, justify="right" if figure else "left", no_wrap=figure, overflow="fold", min_width=least
        )
    for line in lines:
        table.add_row(*map(escape, line))  # text from files may look like markup
    return table


def table_cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows: those of `COLUMNS` or, for the search of a single experiment, one column per key."""
    keys = dict.fromkeys(key for row in rows for key in row.settings)
    if not keys or len({row.experiment for row in rows}) > 1 or any(row.experiment in PUBLISHED for row in rows):
        return list(COLUMNS), [row_cells(row) for row in rows]
    has_seeds = any(len(row.jobs) > 1 for row in rows)
    lines = []
    for row in rows:
        _, n, knn, *_, status = row_cells(row)
        folders = ", ".join(job.run.name for job in row.jobs)
        values = [row.settings.get(key, "") for key in keys]
        lines.append([folders, *values, *([n] if has_seeds else []), knn, status])
    return ["folder", *keys, *(["n"] if has_seeds else []), "k-NN, %", "status"], lines


def markdown_table(rows: list[Row]) -> str:
    """The table as Markdown, with notes below."""
    titles, figures = table_cells(rows)
    lines = [
        _markdown_line([title.replace("\n", " ") for title in titles]),
        "|---|" + "---:|" * (len(titles) - 2) + "---|",
    ]
    lines += [_markdown_line(line) for line in figures]
    sentences = [f"{note[0].upper()}{note[1:]}." for note in notes(rows)]
    return "\n".join([*lines, *(["", " ".join(sentences)] if sentences else [])])


def _markdown_line(texts: list[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    value = mean(known)
    return f"{value:.2f}" if abs(value) >= 0.01 or value == 0 else f"{value:.0e}"


def _network_and_images(job: Job) -> str:
    """The settings, besides the seed, that the k-NN accuracy of an untrained network depends on."""
    return json.dumps([job.run.setting(group) for group in ("backbone", "data", "callbacks.knn")], default=str)
