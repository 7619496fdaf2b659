"""SVG elements of the pictures of a sweep: text, axis labels, and a marker for each state of a run."""

from collections.abc import Iterable, Sequence
from html import escape

from dino_lightning.report.sweeps.jobs import STATES
from dino_lightning.report.sweeps.points import Axis, Point

COLORS = ("#2a7fd4", "#d9541e", "#2f9048", "#a855c8", "#a87b00", "#d6336c", "#0b8f9c", "#7a7f87", "#6a6ce0", "#7d8a2e")
"""Each contrasts with white and with near-black, like `INK`."""
INK = "#767676"
CHARACTER_WIDTH = 6.5
"""Average width of a character (pixels)."""
MAX_LABEL_CHARS = 22
"""Longer labels of an axis are truncated."""
HORIZONTAL_HEIGHT, ROTATED_HEIGHT = 56, 56 + 110
"""Height below an axis with horizontal and with rotated labels (pixels)."""
BEST = COLORS[1]


def svg_document(parts: Iterable[str], *, title: str, width: int, height: int) -> str:
    """A complete SVG file."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">'
    )
    return "\n".join([head, f"<title>{escape(title)}</title>", *parts, "</svg>", ""])


def svg_text(x: float, y: float, text: str, *, anchor: str = "middle", color: str = INK, rotation: float = 0) -> str:
    """A text element; `rotation` in degrees."""
    transform = f' transform="rotate({rotation:g} {x:.1f} {y:.1f})"' if rotation else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}"{transform}>{escape(text)}</text>'


def axis_label_height(axes: Sequence[Axis], *, width: float) -> int:
    """Height of the labels below these axes (pixels)."""
    return ROTATED_HEIGHT if any(_is_crowded(axis, width) for axis in axes) else HORIZONTAL_HEIGHT


def axis_labels(axis: Axis, key: str, *, left: float, width: float, y: float, label_height: int) -> str:
    """The tick labels of an axis that starts at `left`, and its key."""
    crowded = _is_crowded(axis, width)
    parts = []
    for position, name in axis.ticks():
        x = left + position * width
        label = name if len(name) <= MAX_LABEL_CHARS else f"{name[: MAX_LABEL_CHARS - 1]}…"
        parts.append(svg_text(x, y + 16, label, anchor="end", rotation=-60) if crowded else svg_text(x, y + 16, label))
    return "\n".join([*parts, svg_text(left + width / 2, y + label_height - 16, key)])


def _is_crowded(axis: Axis, width: float) -> bool:
    names = [name for _, name in axis.ticks()]
    return any(len(name) * CHARACTER_WIDTH > width / len(names) for name in names)


def state_marker(state: str, x: float, y: float) -> str:
    """The marker of a run in this state."""
    if state == "failed":
        d = f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"
        return f'<path class="failed" d="{d}" stroke="{BEST}" stroke-width="2"/>'
    look = {
        "finished": f'fill="{COLORS[0]}" fill-opacity="0.85"',
        "pruned": f'fill="none" stroke="{COLORS[0]}" stroke-width="1.5"',
        "under way": f'fill="none" stroke="{INK}" stroke-width="1.5" stroke-dasharray="2 2"',
    }[state]
    return f'<circle class="{state.replace(" ", "-")}" cx="{x:.1f}" cy="{y:.1f}" r="4.5" {look}/>'


def best_marker(x: float, y: float) -> str:
    """A ring around the best run."""
    return f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="8" fill="none" stroke="{BEST}" stroke-width="1.5"/>'


def with_tooltip(point: Point, drawing: str) -> str:
    """The drawing of a run with a tooltip."""
    figure = "" if point.knn is None else f", k-NN {point.knn:.1f} %"
    return f"<g><title>{escape(f'folder {point.name}, {point.state}{figure}')}</title>{drawing}</g>"


def legend() -> str:
    """The markers and their meaning, in one row."""
    parts = []
    for index, state in enumerate(STATES):
        x = 20 + 100 * index
        parts.append(state_marker(state, x, 12) + svg_text(x + 12, 16, state, anchor="start"))
    x = 20 + 100 * len(STATES)
    return "".join([*parts, best_marker(x, 12), svg_text(x + 14, 16, "best", anchor="start")])
