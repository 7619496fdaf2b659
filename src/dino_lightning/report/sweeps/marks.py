"""What the pictures of a sweep are drawn with: words, names below an axis, and a mark for each state of a run."""

from collections.abc import Sequence
from html import escape

from dino_lightning.report.sweeps.collapse_curves import COLORS, INK
from dino_lightning.report.sweeps.points import STATES, Axis, Point

CHARACTER_WIDTH = 6.5
"""Pixels of a character, on average."""
MAX_LABEL_CHARS = 22
"""Characters of a name below an axis; of a longer one the beginning."""
LEVEL, TURNED = 56, 56 + 110
"""Pixels below an axis with level names, and with turned ones."""
BEST = COLORS[1]


def svg_text(x: float, y: float, words: str, *, anchor: str = "middle", color: str = INK, turn: float = 0) -> str:
    """Words in the picture."""
    turned = f' transform="rotate({turn:g} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}"{turned}>{escape(words)}</text>'


def axis_label_height(axes: Sequence[Axis], *, width: float) -> int:
    """Pixels that names below the widest of these axes take."""
    return TURNED if any(_is_crowded(axis, width) for axis in axes) else LEVEL


def axis_labels(axis: Axis, key: str, *, left: float, width: float, y: float, room: int) -> str:
    """The marks of an axis that starts at `left`, and its key."""
    crowded = _is_crowded(axis, width)
    parts = []
    for place, name in axis.ticks():
        x = left + place * width
        shown = name if len(name) <= MAX_LABEL_CHARS else f"{name[: MAX_LABEL_CHARS - 1]}…"
        parts.append(svg_text(x, y + 16, shown, anchor="end", turn=-60) if crowded else svg_text(x, y + 16, shown))
    return "\n".join([*parts, svg_text(left + width / 2, y + room - 16, key)])


def _is_crowded(axis: Axis, width: float) -> bool:
    names = [name for _, name in axis.ticks()]
    return any(len(name) * CHARACTER_WIDTH > width / len(names) for name in names)


def state_marker(state: str, x: float, y: float) -> str:
    """What stands for a run in this state."""
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
    """Around the best run."""
    return f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="8" fill="none" stroke="{BEST}" stroke-width="1.5"/>'


def with_tooltip(point: Point, drawn: str) -> str:
    """What is drawn for a run, with words for whoever points at it."""
    figure = "" if point.knn is None else f", k-NN {point.knn:.1f} %"
    return f"<g><title>{escape(f'folder {point.name}, {point.state}{figure}')}</title>{drawn}</g>"


def legend() -> str:
    """The marks and what they mean, in one row."""
    parts = []
    for place, state in enumerate(STATES):
        x = 20 + 100 * place
        parts.append(state_marker(state, x, 12) + svg_text(x + 12, 16, state, anchor="start"))
    x = 20 + 100 * len(STATES)
    return "".join([*parts, best_marker(x, 12), svg_text(x + 14, 16, "best", anchor="start")])
