"""A chart as static SVG, for pages without scripts, and axis ticks.

The tick rules exist a second time in `assets/charts.js`, which computes ticks again when the reader zooms.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from dino_lightning.report.charts import ReferenceLine
from dino_lightning.report.run_folder import Curve

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 200, 56, 8, 10, 24
"""Size and margins (pixels)."""
COLORS = 10
"""Number of colors in the style sheet (`--s0`, ...); further lines are dashed."""


@dataclass(frozen=True)
class Line:
    """A curve; `number` selects its color and dashes."""

    curve: Curve
    number: int
    thin: bool = False


@dataclass(frozen=True)
class Axes:
    """Maps steps and values to pixels."""

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


def chart_svg(lines: Sequence[Line], references: Sequence[ReferenceLine], *, zero: bool, log: bool) -> Markup:
    """Axes, curves and reference lines, in the colors of the page."""
    values = [value for line in lines for _, value in line.curve] + [line.value for line in references]
    usable = [value for value in [*values, *([0.0] if zero else [])] if not log or value > 0]
    low, high = min(usable), max(usable)
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    # The axis of a non-negative quantity does not extend below 0.
    bounds = (low / 1.08, high * 1.08) if log else (max(0.0, low - pad) if low >= 0 else low - pad, high + pad)
    steps = [step for line in lines for step, _ in line.curve]
    axes = Axes((min(steps), max(steps)), bounds, log)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">', _grid(axes)]
    parts += [_polyline(axes, line) for line in lines]
    parts += [_reference(axes, line) for line in references if not log or line.value > 0]
    return Markup("".join([*parts, "</svg>"]))


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * part for part in (1, 2, 2.5, 5, 10) if unit * part >= rough * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; for a range of at most three powers also 2 and 5 times these."""
    is_wide = math.log10(high / low) > 3
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    marks = [part * 10.0**power for power in powers for part in ((1,) if is_wide else (1, 2, 5))]
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
    if len(points) == 1:
        x, y = points[0]
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill:var(--s{line.number % COLORS})"/>'
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="line {kind}" style="stroke:var(--s{line.number % COLORS})" d="M{path}"/>' if points else ""


def _reference(axes: Axes, line: ReferenceLine) -> str:
    y = axes.y(line.value)
    label = f'<text class="label" x="{WIDTH - RIGHT}" y="{y + 14 if y < TOP + 6 else y - 5:.1f}" text-anchor="end">'
    return f'<path class="reference" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>{label}{escape(line.label)}</text>'
