"""k-NN over the settings of a sweep, as an SVG file: a curve for one key, a map for two, one panel each for more."""

import math
from dataclasses import dataclass
from statistics import mean

from dino_lightning.report.runs import format_setting
from dino_lightning.report.svg import ticks
from dino_lightning.report.sweeps.jobs import STATES
from dino_lightning.report.sweeps.map import WIDTH as MAP_WIDTH
from dino_lightning.report.sweeps.map import map_svg
from dino_lightning.report.sweeps.marks import (
    COLORS,
    INK,
    axis_label_height,
    axis_labels,
    best_marker,
    legend,
    state_marker,
    svg_document,
    svg_text,
    with_tooltip,
)
from dino_lightning.report.sweeps.points import Axis, Point, Sweep, axis_of

WIDTH, PLOT, LEFT, TOP, RIGHT = 400, 230, 60, 24, 16
"""Width of a panel, height of its plot, margins (pixels)."""
COLUMNS = 3
HEAD, LEGEND, MIN_WIDTH = 70, 34, 560
"""Heights above and below the panels, minimum width of the picture (pixels)."""
LINE = 16
"""Height of a line of text (pixels)."""


@dataclass(frozen=True)
class Panel:
    """Maps the values of one key and k-NN accuracies to pixels."""

    key: str
    axis: Axis
    low: float
    high: float

    def x(self, point: Point) -> float:
        """Pixels from the left."""
        return LEFT + self.axis.position(point.values[self.key]) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Pixels from the top; `value` in percent."""
        return TOP + (self.high - value) / (self.high - self.low) * PLOT


def sweep_svg(sweep: Sweep) -> str:
    """The picture; pruned, failed and running runs have other markers than finished ones."""
    body, width, height = _panels(sweep)
    summary = _summary(sweep)
    parts = [
        *(svg_text(12, 20 + LINE * index, line, anchor="start") for index, line in enumerate(summary)),
        f'<g transform="translate(0 {HEAD})">{body}</g>',
        f'<g transform="translate(0 {HEAD + height})">{legend()}</g>',
    ]
    return svg_document(parts, title=" ".join(summary), width=max(width, MIN_WIDTH), height=HEAD + height + LEGEND)


def _summary(sweep: Sweep) -> list[str]:
    """The number of runs by state, the best run, and the k-NN accuracy of the untrained network."""
    counts = {state: sum(point.state == state for point in sweep.points) for state in STATES}
    runs = "1 run" if len(sweep.points) == 1 else f"{len(sweep.points)} runs"
    lines = [f"{runs}: {', '.join(f'{number} {state}' for state, number in counts.items() if number)}."]
    if (best := sweep.best) is not None:
        values = ", ".join(f"{key}={format_setting(value)}" for key, value in best.values.items())
        lines.append(f"Best: k-NN {best.knn:.1f} % in folder {best.name}, {values}.")
    if sweep.untrained is not None:
        lines.append(f"Untrained network: k-NN {sweep.untrained:.1f} %.")
    return lines


def _panels(sweep: Sweep) -> tuple[str, int, int]:
    """The panels, their total width and height."""
    if len(sweep.keys) == 2:
        drawing, height = map_svg(sweep)
        return drawing, MAP_WIDTH + RIGHT, height
    figures = [knn for knn in (*(point.knn for point in sweep.points), sweep.untrained) if knn is not None]
    low, high = (min(figures), max(figures)) if figures else (0.0, 100.0)
    pad = max(0.08 * (high - low), 0.5)
    low, high = max(0.0, low - pad), high + pad
    panels = [Panel(key, axis_of([point.values[key] for point in sweep.points]), low, high) for key in sweep.keys]
    label_height = axis_label_height([panel.axis for panel in panels], width=WIDTH - LEFT - RIGHT)
    columns, height = min(COLUMNS, len(panels)), TOP + PLOT + label_height
    parts = [
        f'<g transform="translate({WIDTH * (index % columns)} {height * (index // columns)})">'
        f"{_panel(panel, sweep, label_height=label_height)}</g>"
        for index, panel in enumerate(panels)
    ]
    return "\n".join(parts), WIDTH * columns, height * math.ceil(len(panels) / columns)


def _panel(panel: Panel, sweep: Sweep, *, label_height: int) -> str:
    parts = [_axes(panel, label_height=label_height)]
    if sweep.untrained is not None:
        y = panel.y(sweep.untrained)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{INK}" stroke-dasharray="4 4"/>')
        parts.append(svg_text(WIDTH - RIGHT, y - 4, "untrained", anchor="end"))
    if len(sweep.keys) == 1 and panel.axis.numbers:
        parts.append(_means(panel, sweep))
    return "\n".join([*parts, *(_point(panel, point, best=point is sweep.best) for point in sweep.points)])


def _axes(panel: Panel, *, label_height: int) -> str:
    bottom = TOP + PLOT
    parts = [f'<path d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke="{INK}"/>']
    for value in ticks(panel.low, panel.high):
        y = panel.y(value)
        parts.append(svg_text(LEFT - 6, y + 4, f"{value:.5g}", anchor="end"))
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{INK}" stroke-opacity="0.2"/>')
    width = WIDTH - LEFT - RIGHT
    parts.append(axis_labels(panel.axis, panel.key, left=LEFT, width=width, y=bottom, label_height=label_height))
    return "\n".join([*parts, svg_text(12, TOP - 10, "k-NN, %", anchor="start")])


def _means(panel: Panel, sweep: Sweep) -> str:
    """The curve of one key through the means of its finished runs."""
    by_x: dict[float, list[float]] = {}
    for point in sweep.points:
        if point.knn is not None and point.state == "finished":
            by_x.setdefault(panel.x(point), []).append(point.knn)
    corners = " ".join(f"{x:.1f},{panel.y(mean(figures)):.1f}" for x, figures in sorted(by_x.items()))
    return f'<polyline fill="none" stroke="{COLORS[0]}" stroke-width="1.5" points="{corners}"/>'


def _point(panel: Panel, point: Point, *, best: bool) -> str:
    """The marker of a run; failed runs are at the bottom."""
    if point.knn is None and point.state != "failed":
        return ""
    x = panel.x(point)
    y = TOP + PLOT - 6 if point.knn is None or point.state == "failed" else panel.y(point.knn)
    return with_tooltip(point, state_marker(point.state, x, y) + (best_marker(x, y) if best else ""))
