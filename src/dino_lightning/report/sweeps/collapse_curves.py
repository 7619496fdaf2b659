"""Entropy and KL divergence over the steps of a sweep's runs, like the paper's figure 7, as an SVG file."""

import math
from dataclasses import dataclass

from dino_lightning.errors import UserError
from dino_lightning.report.curves import downsample
from dino_lightning.report.svg import ticks
from dino_lightning.report.sweeps.jobs import Row
from dino_lightning.report.sweeps.marks import COLORS, INK, svg_document, svg_text
from dino_lightning.report.sweeps.table import prototypes

ENTROPY, DIVERGENCE = "collapse/teacher_entropy", "collapse/teacher_student_kl"

DASHES = ("", "6 3", "2 2", "8 2 2 2")
"""Dashes distinguish experiments with the same color."""

PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP, GAP = 380, 260, 60, 34, 90
"""Size of a panel, left and top margins, gap between the two panels (pixels)."""
LEGEND_ROW, LEGEND_COLUMNS, SHORT_NAME = 20, 3, 36
"""Row height (pixels), columns if all names are short, maximum characters of a short name."""
WIDTH = LEFT + 2 * PANEL_WIDTH + GAP + 20


@dataclass(frozen=True)
class Panel:
    """Maps steps from 0 to `right` and values from 0 to `top` to pixels."""

    left: float
    right: float
    top: float

    def point(self, step: float, value: float) -> tuple[float, float]:
        """Pixel coordinates of a point."""
        return (self.left + PANEL_WIDTH * step / self.right, TOP + PANEL_HEIGHT * (1 - min(value, self.top) / self.top))


def curves_svg(rows: list[Row]) -> str:
    """Two panels with one color per row and one thin line per seed; `ln K` is the entropy of a uniform output.

    Raises `UserError` if no run has these curves.
    """
    rows = [row for row in rows if any(job.run.curves.get(ENTROPY) for job in row.jobs)]
    if not rows:
        raise UserError(f"curves: none of these runs has logged {ENTROPY} yet.")
    widths = sorted({K for row in rows for job in row.jobs if (K := prototypes(job))})
    levels = {f"ln {K}": math.log(K) for K in widths}
    columns = LEGEND_COLUMNS if all(len(row.name) <= SHORT_NAME for row in rows) else 1
    legend_rows = math.ceil(len(rows) / columns)
    height = TOP + PANEL_HEIGHT + 56 + LEGEND_ROW * legend_rows
    parts = [
        _panel(rows, ENTROPY, "entropy of the teacher (nats)", left=LEFT, levels=levels),
        _panel(rows, DIVERGENCE, "KL(teacher ‖ student) (nats)", left=LEFT + PANEL_WIDTH + GAP, levels={}),
        *(_legend(row, index, columns=columns) for index, row in enumerate(rows)),
    ]
    return svg_document(parts, title=", ".join(row.name for row in rows), width=WIDTH, height=height)


def _panel(rows: list[Row], column: str, title: str, *, left: float, levels: dict[str, float]) -> str:
    runs = [(index, job.run) for index, row in enumerate(rows) for job in row.jobs]
    curves = [(index, run.curves[column]) for index, run in runs if run.curves.get(column)]
    points = [point for _, curve in curves for point in curve]
    right = max((step for step, _ in points), default=1) or 1
    highest = max([value for _, value in points] + list(levels.values()), default=1) or 1
    panel = Panel(left, right=right, top=highest * 1.05)
    lines = [
        f'<polyline fill="none" {_stroke(index)} stroke-width="1.2" stroke-linejoin="round" '
        f'points="{" ".join("{:.1f},{:.1f}".format(*panel.point(*point)) for point in downsample(curve))}"/>'
        for index, curve in curves
    ]
    return "\n".join([_axes(panel, title), *(_level(panel, *level) for level in levels.items()), *lines])


def _axes(panel: Panel, title: str) -> str:
    bottom = TOP + PANEL_HEIGHT
    parts = [
        svg_text(panel.left, TOP - 14, title, anchor="start"),
        svg_text(panel.left + PANEL_WIDTH / 2, bottom + 34, "step"),
        f'<path d="M{panel.left} {TOP}V{bottom}H{panel.left + PANEL_WIDTH}" fill="none" stroke="{INK}"/>',
    ]
    for step in ticks(0, panel.right, count=7):
        x, _ = panel.point(step, 0)
        parts.append(svg_text(x, bottom + 16, f"{step:,.10g}"))
    for value in ticks(0, panel.top, count=7):
        _, y = panel.point(0, value)
        parts.append(svg_text(panel.left - 6, y + 4, f"{value:.10g}", anchor="end"))
        parts.append(f'<path d="M{panel.left} {y:.1f}h{PANEL_WIDTH}" stroke="{INK}" stroke-opacity="0.25"/>')
    return "\n".join(parts)


def _level(panel: Panel, name: str, value: float) -> str:
    x, y = panel.point(panel.right, value)
    line = f'<path d="M{panel.left} {y:.1f}H{x:.1f}" stroke="{INK}" stroke-dasharray="4 4"/>'
    return line + svg_text(x + 4, y + 4, name, anchor="start")


def _legend(row: Row, index: int, *, columns: int) -> str:
    width = (WIDTH - LEFT) / columns
    x, y = LEFT + width * (index % columns), TOP + PANEL_HEIGHT + 58 + LEGEND_ROW * (index // columns)
    line = f'<path d="M{x:.0f} {y - 4:.0f}h22" {_stroke(index)} stroke-width="2.5"/>'
    return line + svg_text(x + 28, y, row.name, anchor="start")


def _stroke(index: int) -> str:
    dash = DASHES[index // len(COLORS) % len(DASHES)]
    return f'stroke="{COLORS[index % len(COLORS)]}"' + (f' stroke-dasharray="{dash}"' if dash else "")
