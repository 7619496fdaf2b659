"""Entropy and KL divergence of a sweep's runs over their steps, as in the paper's figure 7: one SVG file."""

import math
from dataclasses import dataclass
from html import escape

from dino_lightning.errors import UserError
from dino_lightning.report.curves import downsample
from dino_lightning.report.run_folder import Curve
from dino_lightning.report.sweeps.jobs import Row
from dino_lightning.report.sweeps.table import prototypes

ENTROPY, DIVERGENCE = "collapse/teacher_entropy", "collapse/teacher_student_kl"

COLORS = ("#2a7fd4", "#d9541e", "#2f9048", "#a855c8", "#a87b00", "#d6336c", "#0b8f9c", "#7a7f87", "#6a6ce0", "#7d8a2e")
"""Of experiments, in order: each stands out from white and from near-black alike, and so does `INK`."""
INK = "#767676"
DASHES = ("", "6 3", "2 2", "8 2 2 2")
"""For experiments beyond the colors."""

PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP, GAP = 380, 260, 60, 34, 90
"""Pixels: a panel, the margins left and above, and the gap between the two."""
LEGEND_ROW, LEGEND_COLUMNS, SHORT_NAME = 20, 3, 36
"""Pixels; columns where all names are short; characters of a short one."""
WIDTH = LEFT + 2 * PANEL_WIDTH + GAP + 20


@dataclass(frozen=True)
class Panel:
    """Where data go: x from 0 to `right`, y from 0 to `top`, in pixels of the picture."""

    left: float
    right: float
    top: float

    def point(self, step: float, value: float) -> tuple[float, float]:
        """Pixels of a point."""
        return (
            self.left + PANEL_WIDTH * step / self.right,
            TOP + PANEL_HEIGHT * (1 - min(value, self.top) / self.top),
        )


def curves_svg(rows: list[Row]) -> str:
    """Two panels, one color for each row, a thin line for each seed; `ln K` is where all prototypes are alike.

    Raises `UserError` where no run has these curves.
    """
    drawn = [row for row in rows if any(job.run.curves.get(ENTROPY) for job in row.jobs)]
    if not drawn:
        raise UserError(f"--curves: none of these runs has a value of {ENTROPY} in its metrics.csv yet.")
    widths = sorted({K for row in drawn for job in row.jobs if (K := prototypes(job))})
    levels = {f"ln {K}": math.log(K) for K in widths}
    columns = LEGEND_COLUMNS if all(len(row.name) <= SHORT_NAME for row in drawn) else 1
    legend_rows = math.ceil(len(drawn) / columns)
    height = TOP + PANEL_HEIGHT + 56 + LEGEND_ROW * legend_rows
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">',
        f"<title>{escape(', '.join(row.name for row in drawn))}</title>",
        _panel(drawn, ENTROPY, "entropy of the teacher (nats)", left=LEFT, levels=levels),
        _panel(drawn, DIVERGENCE, "KL(teacher ‖ student) (nats)", left=LEFT + PANEL_WIDTH + GAP, levels={}),
        *(_legend(row, index, columns=columns) for index, row in enumerate(drawn)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _panel(rows: list[Row], column: str, title: str, *, left: float, levels: dict[str, float]) -> str:
    curves = [(index, curve) for index, row in enumerate(rows) for curve in _curves(row, column)]
    points = [point for _, curve in curves for point in curve]
    right = max((step for step, _ in points), default=1) or 1
    highest = max([value for _, value in points] + list(levels.values()), default=1) or 1
    panel = Panel(left, right=right, top=highest * 1.05)
    lines = [
        f'<polyline fill="none" {_stroke(index)} stroke-width="1.2" stroke-linejoin="round" '
        f'points="{" ".join(_pair(panel, *point) for point in downsample(curve))}"/>'
        for index, curve in curves
    ]
    return "\n".join([_axes(panel, title), *(_level(panel, *level) for level in levels.items()), *lines])


def _curves(row: Row, column: str) -> list[Curve]:
    return [job.run.curves[column] for job in row.jobs if job.run.curves.get(column)]


def _axes(panel: Panel, title: str) -> str:
    bottom = TOP + PANEL_HEIGHT
    parts = [
        _text(panel.left, TOP - 14, title, anchor="start"),
        _text(panel.left + PANEL_WIDTH / 2, bottom + 34, "step"),
        f'<path d="M{panel.left} {TOP}V{bottom}H{panel.left + PANEL_WIDTH}" fill="none" stroke="{INK}"/>',
    ]
    for step in ticks(panel.right):
        x, _ = panel.point(step, 0)
        parts.append(_text(x, bottom + 16, f"{step:,.10g}"))
    for value in ticks(panel.top):
        _, y = panel.point(0, value)
        parts.append(_text(panel.left - 6, y + 4, f"{value:.10g}", anchor="end"))
        parts.append(f'<path d="M{panel.left} {y:.1f}h{PANEL_WIDTH}" stroke="{INK}" stroke-opacity="0.25"/>')
    return "\n".join(parts)


def ticks(top: float) -> list[float]:
    """Round numbers from 0 to `top`, four to eight of them."""
    unit = 10 ** math.floor(math.log10(top))
    step = next(unit * part for part in (0.2, 0.25, 0.5, 1, 2) if top / (unit * part) <= 7)
    return [round(step * count, 12) for count in range(int(top / step) + 1)]


def _level(panel: Panel, name: str, value: float) -> str:
    x, y = panel.point(panel.right, value)
    line = f'<path d="M{panel.left} {y:.1f}H{x:.1f}" stroke="{INK}" stroke-dasharray="4 4"/>'
    return line + _text(x + 4, y + 4, name, anchor="start")


def _legend(row: Row, index: int, *, columns: int) -> str:
    width = (WIDTH - LEFT) / columns
    x, y = LEFT + width * (index % columns), TOP + PANEL_HEIGHT + 58 + LEGEND_ROW * (index // columns)
    line = f'<path d="M{x:.0f} {y - 4:.0f}h22" {_stroke(index)} stroke-width="2.5"/>'
    return line + _text(x + 28, y, row.name, anchor="start")


def _stroke(index: int) -> str:
    dash = DASHES[index // len(COLORS) % len(DASHES)]
    return f'stroke="{COLORS[index % len(COLORS)]}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _pair(panel: Panel, step: float, value: float) -> str:
    x, y = panel.point(step, value)
    return f"{x:.1f},{y:.1f}"


def _text(x: float, y: float, text: str, *, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{INK}">{escape(text)}</text>'
