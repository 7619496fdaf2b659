"""The curves of a report: downsampled, as data for the page's script and as static SVG for pages without scripts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from markupsafe import Markup

from dino_lightning.report.charts import (
    Chart,
    ReferenceLine,
    charts_for,
    one_chart_per_column,
    reference_lines,
    shared_reference_lines,
    spans_factor,
)
from dino_lightning.report.run_folder import Curve, Run
from dino_lightning.report.svg import COLORS, Line, chart_svg

MAX_POINTS = 2000
"""Maximum number of points of one curve in the page; longer curves keep the extremes of equal parts."""
MIN_POINTS = 200
SVG_POINTS = 400
"""Maximum number of points of one curve in the static SVG."""
MAX_PAGE_POINTS = 200_000
"""Points of all curves in the page, about 4 MB. With many runs each curve gets fewer, but at least `MIN_POINTS`."""
LOG_SWITCH_FACTOR = 5
"""A positive quantity whose maximum is at least this many times its minimum gets a switch for a logarithmic axis."""


@dataclass(frozen=True)
class Series:
    """One curve of a chart."""

    name: str
    curve: Curve
    means: Curve | None
    """Means of equal parts of a downsampled curve, which are smoothed instead of its points."""
    number: int
    """Selects color and dashes; in a comparison, the index of the run."""
    thin: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The series as plain types, for the page's script."""
        means = {} if self.means is None else {"means": self.means}
        style = {"color": self.number % COLORS, "dash": self.number // COLORS, "thin": self.thin}
        return {"name": self.name, **style, "points": self.curve, **means}

    @property
    def description(self) -> str:
        """The curve in words."""
        (first, start), (last, end) = self.curve[0], self.curve[-1]
        low, high = (extreme(value for _, value in self.curve) for extreme in (min, max))
        return (
            f"{self.name} from {start:.5g} at step {first:,} to {end:.5g} at step {last:,}, "
            f"between {low:.5g} and {high:.5g}"
        )


@dataclass(frozen=True)
class PlottedChart:
    """A chart with its curves and reference lines."""

    chart: Chart
    series: list[Series]
    reference_lines: list[ReferenceLine]

    def to_dict(self) -> dict[str, Any]:
        """The chart as plain types, for the page's script."""
        lines = [line._asdict() for line in self.reference_lines]
        return {"series": [series.to_dict() for series in self.series], "references": lines, "zero": self.chart.zero}

    @property
    def last_step(self) -> int:
        """The last step of all curves."""
        return max(series.curve[-1][0] for series in self.series)

    @property
    def can_log(self) -> bool:
        """Whether the reader can switch to a logarithmic axis."""
        return spans_factor([value for series in self.series for _, value in series.curve], factor=LOG_SWITCH_FACTOR)

    @property
    def description(self) -> str:
        """The chart in words, for screen readers."""
        return f"{self.chart.title}: {'; '.join(series.description for series in self.series)}."

    @property
    def svg(self) -> Markup:
        """The chart as static SVG."""
        lines = [Line(downsample(series.curve, SVG_POINTS), series.number, thin=series.thin) for series in self.series]
        return chart_svg(lines, self.reference_lines, zero=self.chart.zero, log=self.chart.log and self.can_log)


def plot_run(run: Run) -> list[PlottedChart]:
    """The charts of one run."""
    plots = []
    for chart in charts_for([run]):
        present = [(column, name) for column, name in chart.columns.items() if column in run.curves]
        # Single steps are noise behind the mean of an epoch, if there is one.
        thin = {"train/loss"} if len(present) > 1 else set()
        series = [
            _series(name, run.curves[column], number, most=MAX_POINTS, thin=column in thin)
            for number, (column, name) in enumerate(present)
        ]
        plots.append(PlottedChart(chart, series, reference_lines(run, chart)))
    return plots


def plot_runs(runs: Sequence[Run], labels: Sequence[str]) -> list[PlottedChart]:
    """The charts of several runs on top of each other, with one color per run."""
    most = max_points(runs)
    plots = []
    for chart in one_chart_per_column(runs):
        (column,) = chart.columns
        series = [
            _series(label, run.curves[column], number, most=most)
            for number, (run, label) in enumerate(zip(runs, labels, strict=True))
            if column in run.curves
        ]
        plots.append(PlottedChart(chart, series, shared_reference_lines(runs, chart)))
    return plots


def chart_context(plots: Sequence[PlottedChart], *, epochs: list[tuple[int, int]]) -> dict[str, Any]:
    """Template values for the charts: HTML by section and the data of the page's script, in the same order."""
    sections = [(title, list(group)) for title, group in groupby(plots, key=lambda plot: plot.chart.section)]
    data = {"epochs": epochs, "charts": [plot.to_dict() for plot in plots]}
    return {"chart_sections": sections, "chart_data": data}


def max_points(runs: Sequence[Run]) -> int:
    """Maximum number of points for each curve of these runs in one page."""
    curves = sum(len(run.curves) for run in runs)
    return max(MIN_POINTS, min(MAX_POINTS, MAX_PAGE_POINTS // max(1, curves)))


def downsample(curve: Curve, most: int = MAX_POINTS) -> Curve:
    """At most `most` points of a curve, including its first and last point and the extremes of equal parts."""
    if len(curve) <= most:
        return curve
    points = {curve[0], curve[-1]}
    for part in _parts(curve, most // 2 - 1):
        points |= {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
    return sorted(points)


def _parts(curve: Curve, parts: int) -> list[Curve]:
    return [curve[part * len(curve) // parts : (part + 1) * len(curve) // parts] for part in range(parts)]


def _series(name: str, curve: Curve, number: int, *, most: int, thin: bool = False) -> Series:
    means = None
    if len(curve) > most:
        parts = _parts(curve, most // 2)
        means = [(part[len(part) // 2][0], sum(value for _, value in part) / len(part)) for part in parts]
    return Series(name, downsample(curve, most), means, number, thin)
