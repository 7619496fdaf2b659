"""The curves of a report: thinned, as data for the page's script, and drawn once for where there is no script."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from dino_lightning.report.charts import (
    COLLAPSE,
    Chart,
    ReferenceLine,
    charts_for,
    one_chart_per_column,
    reference_lines,
    spans_factor,
)
from dino_lightning.report.charts import shared_reference_lines as shared
from dino_lightning.report.run_folder import Curve, Run
from dino_lightning.report.svg import COLORS, Line, chart_svg

MAX_POINTS = 2000
"""Points of one curve in the page; of a longer one the extremes of equal parts are kept."""
MIN_POINTS = 200
MAX_PAGE_POINTS = 200_000
"""Points of all curves in the page, some 4 MB: with many runs, each curve gets fewer, `LEAST_POINTS` at the least."""
LOG_SWITCH_FACTOR = 5
"""A positive quantity whose largest value is this many times its smallest can be put on a logarithmic axis."""
HINT = (
    "Point at a chart, or use its arrow keys, to read all charts at that step; drag across it, or press + and −, to "
    "look closer, and double-click or press Escape for all steps again."
)


@dataclass(frozen=True)
class Series:
    """One curve of a chart, as it is drawn."""

    name: str
    curve: Curve
    means: Curve | None
    """Means of equal parts of a curve that was thinned: what is smoothed in its place."""
    last: tuple[int, float]
    number: int
    """Chooses color and dashes; in a comparison, the run."""
    thin: bool = False

    def plain(self) -> dict[str, Any]:
        """For the page's script."""
        means = {} if self.means is None else {"means": self.means}
        look = {"color": self.number % COLORS, "dash": self.number // COLORS, "thin": self.thin}
        return {"name": self.name, **look, "points": self.curve, **means}


@dataclass(frozen=True)
class PlottedChart:
    """A chart with its curves and the lines that it is read against."""

    chart: Chart
    series: list[Series]
    references: list[ReferenceLine]

    def plain(self) -> dict[str, Any]:
        """For the page's script."""
        lines = [{"value": line.value, "label": line.label} for line in self.references]
        return {"series": [one.plain() for one in self.series], "references": lines, "zero": self.chart.zero}


def plot_run(run: Run) -> list[PlottedChart]:
    """The charts of one run."""
    found = []
    for chart in charts_for([run]):
        present = [(column, name) for column, name in chart.columns.items() if column in run.curves]
        # Single steps are noise behind the mean of an epoch, where there is one.
        thin = {"train/loss"} if len(present) > 1 else set()
        series = [
            _series(name, run.curves[column], number, most=MAX_POINTS, thin=column in thin)
            for number, (column, name) in enumerate(present)
        ]
        found.append(PlottedChart(chart, series, reference_lines(run, chart)))
    return found


def plot_runs(runs: Sequence[Run], names: Sequence[str]) -> list[PlottedChart]:
    """The charts of several runs on top of each other, each run in a color of its own."""
    most = max_points(runs)
    found = []
    for chart in one_chart_per_column(runs):
        (column,) = chart.columns
        series = [
            _series(name, run.curves[column], number, most=most)
            for number, (run, name) in enumerate(zip(runs, names, strict=True))
            if column in run.curves
        ]
        found.append(PlottedChart(chart, series, shared(runs, chart)))
    return found


def max_points(runs: Sequence[Run]) -> int:
    """Points that each curve of these runs may have in one page."""
    curves = sum(len(run.curves) for run in runs)
    return max(MIN_POINTS, min(MAX_POINTS, MAX_PAGE_POINTS // max(1, curves)))


def downsample(curve: Curve, most: int = MAX_POINTS) -> Curve:
    """At most `most` of a curve's own points, its first, last, peaks and troughs among them."""
    if len(curve) <= most:
        return curve
    kept = {curve[0], curve[-1]}
    for some in _parts(curve, most // 2 - 1):
        kept |= {min(some, key=lambda point: point[1]), max(some, key=lambda point: point[1])}
    return sorted(kept)


def _parts(curve: Curve, parts: int) -> list[Curve]:
    return [curve[part * len(curve) // parts : (part + 1) * len(curve) // parts] for part in range(parts)]


def _series(name: str, curve: Curve, number: int, *, most: int, thin: bool = False) -> Series:
    means = None
    if len(curve) > most:
        parts = _parts(curve, most // 2)
        means = [(part[len(part) // 2][0], sum(value for _, value in part) / len(part)) for part in parts]
    return Series(name, downsample(curve, most), means, curve[-1], number, thin)


def curves_json(charts: Sequence[PlottedChart], *, epochs: list[tuple[int, int]]) -> str:
    """The charts in the order of `curves_html`, for a script element."""
    data = {"epochs": epochs, "charts": [drawn.plain() for drawn in charts]}
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")  # so that no value can close the element


def curves_html(charts: Sequence[PlottedChart], *, collapse: str | None = None, runs: Sequence[str] = ()) -> str:
    """All charts by section, below the controls that they share; with `runs`, a button for each run among them."""
    if not charts:
        note = '<p class="soft">There are no curves: metrics.csv is missing or empty.</p>'
        return f'<section aria-labelledby="curves"><h2 id="curves">Curves</h2>{note}</section>'
    sections = []
    for title, group in groupby(charts, key=lambda drawn: drawn.chart.section):
        name = title.lower().replace(" ", "-")
        said = f"<p>Collapse: {escape(collapse)}. What to change stands in docs/collapse.md.</p>" if collapse else ""
        figures = "".join(_figure(drawn) for drawn in group)
        lead = said if title == COLLAPSE else ""
        sections.append(
            f'<section aria-labelledby="{name}"><h3 id="{name}">{title}</h3>{lead}'
            f'<div class="charts">{figures}</div></section>'
        )
    return (
        f'<section aria-labelledby="curves" class="curves"><h2 id="curves">Curves</h2><p class="soft script">{HINT}</p>'
        f"{_tools(runs)}{''.join(sections)}</section>"
    )


def _tools(runs: Sequence[str]) -> str:
    keys = "".join(key_button(name, number) for number, name in enumerate(runs))
    legend = f'<div class="keys all" role="group" aria-label="Runs in all charts">{keys}</div>' if runs else ""
    return (
        '<form class="card tools script" id="tools">'
        '<label>Steps from <input type="number" name="from" min="0" step="1"></label>'
        '<label>to <input type="number" name="to" min="0" step="1"></label>'
        '<button type="reset">All steps</button>'
        '<label class="smooth">Smoothing <input type="range" name="smooth" min="0" max="20" value="0"> '
        '<output name="shown">off</output></label>'
        f"{legend}</form>"
    )


def key_button(name: str, number: int, *, value: str | None = None) -> str:
    """An entry of a legend that shows and hides its curve."""
    look = f"border-top-color:var(--s{number % COLORS})"
    shown = "" if value is None else f" <b>{value}</b><small></small>"
    return (
        f'<button type="button" class="key" aria-pressed="true" data-series="{number}">'
        f'<i class="d{number // COLORS}" style="{look}"></i>{escape(name)}{shown}</button>'
    )


def _figure(drawn: PlottedChart) -> str:
    chart, series = drawn.chart, drawn.series
    values = [value for one in series for _, value in one.curve]
    checked = " checked" if chart.log else ""
    can_log = spans_factor(values, times=LOG_SWITCH_FACTOR)
    log = f'<label class="script"><input type="checkbox"{checked}>log</label>' if can_log else ""
    keys = "".join(key_button(one.name, one.number, value=f"{one.last[1]:.5g}") for one in series)
    last = max(one.last[0] for one in series)
    text = f"<p>{escape(chart.text)}</p>" if chart.text else ""
    lines = [Line(downsample(one.curve, 400), one.number, thin=one.thin) for one in series]
    picture = chart_svg(lines, drawn.references, zero=chart.zero, log=chart.log and can_log)
    return (
        f'<figure class="card chart"><figcaption><div class="head"><h4>{escape(chart.title)}</h4>{log}</div>{text}'
        f'</figcaption><output aria-live="off"><span class="at">step {last:,}</span>'
        f'<span class="keys">{keys}</span></output>'
        f'<div class="plot" tabindex="0" role="img" aria-label="{escape(_spoken(drawn))}">{picture}</div></figure>'
    )


def _spoken(drawn: PlottedChart) -> str:
    parts = []
    for one in drawn.series:
        (first, start), (last, end) = one.curve[0], one.curve[-1]
        low, high = (pick(value for _, value in one.curve) for pick in (min, max))
        parts.append(
            f"{one.name} from {start:.5g} at step {first:,} to {end:.5g} at step {last:,}, "
            f"between {low:.5g} and {high:.5g}"
        )
    return f"{drawn.chart.title}: {'; '.join(parts)}."
