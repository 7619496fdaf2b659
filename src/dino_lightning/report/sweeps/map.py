"""A map of two keys of a sweep, with cells for few values and points otherwise; colors show k-NN accuracies."""

from statistics import mean

from dino_lightning.report.sweeps.marks import (
    INK,
    axis_label_height,
    axis_labels,
    best_marker,
    state_marker,
    svg_text,
    with_tooltip,
)
from dino_lightning.report.sweeps.points import Axis, Point, Sweep, axis_of

WIDTH, MAX_SIDE, MIN_SIDE = 520, 64, 30
"""Width of the map, maximum and minimum height of a cell (pixels)."""
LEFT, TOP, PLOT = 110, 24, 300
"""Margins and height of a map of points (pixels)."""
LOW, HIGH = (219, 233, 248), (8, 62, 132)
"""Colors of the lowest and the highest accuracy."""


def map_svg(sweep: Sweep) -> tuple[str, int]:
    """The map and its height in pixels."""
    across, up = (axis_of([point.values[key] for point in sweep.points], few_as_names=True) for key in sweep.keys)
    height = max(MIN_SIDE, min(MAX_SIDE, PLOT // len(up.names))) * len(up.names) if up.names else PLOT
    placed: list[tuple[Point, float, float]] = []
    for point in sweep.points:
        x, y = (axis.position(point.values[key]) for axis, key in zip((across, up), sweep.keys, strict=True))
        placed.append((point, LEFT + x * (WIDTH - LEFT), TOP + (1 - y) * height))
    if across.names and up.names:
        drawn = _cells(sweep, placed, wide=(WIDTH - LEFT) / len(across.names), high=height / len(up.names))
    else:
        drawn = [_point(sweep, *place) for place in placed]
    label_height = axis_label_height([across], width=WIDTH - LEFT)
    parts = [_frame(across, up, sweep.keys, height, label_height), *drawn]
    return "\n".join(parts), TOP + height + label_height


def color(value: float, *, low: float, high: float) -> tuple[str, str]:
    """The color of a value between `low` and `high`, and of text on it."""
    share = (value - low) / (high - low) if high > low else 1.0
    channels = [round(a + (b - a) * share) for a, b in zip(LOW, HIGH, strict=True)]
    return "#" + "".join(f"{channel:02x}" for channel in channels), "#ffffff" if share > 0.5 else "#101010"


def _frame(across: Axis, up: Axis, keys: list[str], height: int, label_height: int) -> str:
    width = WIDTH - LEFT
    parts = [f'<path d="M{LEFT} {TOP}V{TOP + height}H{WIDTH}" fill="none" stroke="{INK}"/>']
    parts.append(axis_labels(across, keys[0], left=LEFT, width=width, y=TOP + height, label_height=label_height))
    for position, name in up.ticks():
        label = name if len(name) <= 15 else f"{name[:14]}…"
        parts.append(svg_text(LEFT - 6, TOP + (1 - position) * height + 4, label, anchor="end"))
    return "\n".join([*parts, svg_text(12, TOP - 10, keys[1], anchor="start")])


def _bounds(points: list[Point]) -> dict[str, float]:
    known = [point.knn for point in points if point.knn is not None]
    return {"low": min(known, default=0.0), "high": max(known, default=1.0)}


def _cells(sweep: Sweep, placed: list[tuple[Point, float, float]], *, wide: float, high: float) -> list[str]:
    """A cell shows the mean of its finished runs or, if there are none, of the others so far."""
    by_position: dict[tuple[float, float], list[Point]] = {}
    for point, x, y in placed:
        by_position.setdefault((x, y), []).append(point)
    parts = []
    for (x, y), points in by_position.items():
        others = [point for point in points if point.state != "failed"] or points
        finished = [point for point in points if point.state == "finished"] or others
        known = [point.knn for point in finished if point.knn is not None]
        state, drawn = finished[0].state, ""
        if known and state != "failed":
            value = mean(known)
            fill, ink = color(value, **_bounds(sweep.points))
            drawn = f'<rect class="cell" x="{x - wide / 2 + 1:.1f}" y="{y - high / 2 + 1:.1f}" width="{wide - 2:.1f}" '
            drawn += f'height="{high - 2:.1f}" fill="{fill}"/>' + svg_text(x, y + 4, f"{value:.1f}", color=ink)
        if state != "finished":
            drawn += state_marker(state, x + min(30, wide / 2 - 8), y)
        if sweep.best in points:
            drawn += best_marker(x - min(30, wide / 2 - 8), y)
        parts.append(with_tooltip(finished[0], drawn))
    return parts


def _point(sweep: Sweep, point: Point, x: float, y: float) -> str:
    drawn = state_marker(point.state, x, y)
    if point.knn is not None and point.state != "failed":
        fill, _ = color(point.knn, **_bounds(sweep.points))
        look = f'fill="{fill}" stroke="{INK}"'
        if point.state != "finished":
            dashes = ' stroke-dasharray="4 3"' if point.state == "under way" else ""
            look = f'fill="none" stroke="{fill}" stroke-width="4"{dashes}'
        drawn = f'<circle class="{point.state.replace(" ", "-")}" cx="{x:.1f}" cy="{y:.1f}" r="7" {look}/>'
        drawn += svg_text(x, y - 13, f"{point.knn:.1f}")
    if point is sweep.best:
        drawn += f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="12" fill="none" stroke="#d9541e"/>'
    return with_tooltip(point, drawn)
