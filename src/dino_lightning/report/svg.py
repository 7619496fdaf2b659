"""A chart as SVG, drawn once: what a page shows where no script draws it anew."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from dino_lightning.report.charts import ReferenceLine
from dino_lightning.report.run_folder import Curve

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 200, 56, 8, 10, 24
"""Pixels of the picture, and its margins."""
COLORS = 10
"""Colors of the page's style sheet, `--s0` and on; beyond these, lines are dashed."""


@dataclass(frozen=True)
class Line:
    """A curve and how it looks: `number` chooses color and dashes."""

    curve: Curve
    number: int
    thin: bool = False


@dataclass(frozen=True)
class Axes:
    """Where data go."""

    steps: tuple[float, float]
    values: tuple[float, float]
    log: bool

    def x(self, step: float) -> float:
        """Pixels from the left."""
        low, high = self.steps
        share = (step - low) / (high - low) if high > low else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        scale: Callable[[float], float] = math.log if self.log else float
        low, high = map(scale, self.values)
        return TOP + (high - scale(value)) / (high - low) * (HEIGHT - TOP - BOTTOM)


def chart_svg(lines: Sequence[Line], references: Sequence[ReferenceLine], *, zero: bool, log: bool) -> str:
    """Axes, lines that it is read against, and the curves, in the colors of the page."""
    values = [value for line in lines for _, value in line.curve] + [line.value for line in references]
    usable = [value for value in [*values, *([0.0] if zero else [])] if not log or value > 0]
    low, high = min(usable), max(usable)
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    # A quantity that cannot be negative does not get an axis that says so.
    bounds = (low / 1.08, high * 1.08) if log else (max(0.0, low - pad) if low >= 0 else low - pad, high + pad)
    steps = [step for line in lines for step, _ in line.curve]
    axes = Axes((min(steps), max(steps)), bounds, log)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">', _grid(axes)]
    parts += [_polyline(axes, line) for line in lines]
    parts += [_reference(axes, line) for line in references if not log or line.value > 0]
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * part for part in (1, 2, 2.5, 5, 10) if unit * part >= rough * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, within few of them also 2 and 5 times these."""
    wide = math.log10(high / low) > 3
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    marks = [part * 10.0**power for power in powers for part in ((1,) if wide else (1, 2, 5))]
    return [mark for mark in marks if low * 0.999 <= mark <= high * 1.001]


def _grid(axes: Axes) -> str:
    parts = []
    for value in log_ticks(*axes.values) if axes.log else ticks(*axes.values):
        y = axes.y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.5g}</text>')
    first, last = axes.steps
    for step in ticks(first, max(last, first + 1)):
        if step <= last:
            anchor = "end" if axes.x(step) > WIDTH - 30 else "middle"
            parts.append(f'<text x="{axes.x(step):.1f}" y="{HEIGHT - 5}" text-anchor="{anchor}">{step:,.10g}</text>')
    return "".join(parts)


def _polyline(axes: Axes, line: Line) -> str:
    points = [(axes.x(step), axes.y(value)) for step, value in line.curve if not axes.log or value > 0]
    kind = f"d{line.number // COLORS}{' thin' if line.thin else ''}"
    look = f"stroke:var(--s{line.number % COLORS})"
    if len(points) == 1:
        (x, y) = points[0]
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill:var(--s{line.number % COLORS})"/>'
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="line {kind}" style="{look}" d="M{path}"/>' if points else ""


def _reference(axes: Axes, line: ReferenceLine) -> str:
    y = axes.y(line.value)
    label = f'<text class="label" x="{WIDTH - RIGHT}" y="{y + 14 if y < TOP + 6 else y - 5:.1f}" text-anchor="end">'
    return f'<path class="reference" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>{label}{escape(line.label)}</text>'
