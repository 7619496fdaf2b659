"""The curves of a report: which columns of `metrics.csv` make a chart, what each means, and its part of the page."""

import json
import math
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from dino_lightning.collapse import LEAST_RANK, LEAST_SPREAD
from dino_lightning.report.folder import Curve, Run, finite

MOST_POINTS = 2000
"""Points of one curve in the page; of a longer one the extremes of equal parts are kept."""
COLOURS = 5
HINT = '<p class="soft">Point at a chart, or use its arrow keys, to read all charts at that step.</p>'
LOG_RANGE = 5
"""A positive quantity whose largest value is this many times its smallest can be put on a logarithmic axis."""
WIDE_RANGE = 1000
"""An unknown quantity whose largest value is this many times its smallest starts on a logarithmic axis."""


@dataclass(frozen=True)
class Chart:
    """One chart: a title, what its curve says, and its columns with their names in the legend."""

    section: str
    title: str
    text: str
    columns: dict[str, str]
    log: bool = False
    """Start on a logarithmic axis."""
    zero: bool = False
    """Let the axis start at 0."""


LEARNING, SCHEDULES, COLLAPSE = "Learning", "Schedules", "Signs of collapse"
OTHERS = "Everything else"

CHARTS = [
    Chart(LEARNING, "Training loss", "What the method makes small; of DINO the cross-entropy between teacher and "
          "student, in nats. It should fall, though a teacher that grows more certain or less so moves it, too.",
          {"train/loss": "one step", "train/loss_epoch": "mean of the epoch"}),
    Chart(LEARNING, "k-NN accuracy", "Correct validation images, in percent: the figure to trust. It should rise, "
          "steeply at first.", {"knn/top1": "top-1", "knn/top5": "top-5"}),
    Chart(SCHEDULES, "Learning rate", "Linear warm-up, then half a cosine.", {"schedule/lr": "learning rate"}),
    Chart(SCHEDULES, "Weight decay", "Half a cosine.", {"schedule/weight_decay": "weight decay"}),
    Chart(SCHEDULES, "Momentum of the teacher", "Share of the teacher's old weights that each step keeps.",
          {"schedule/teacher_momentum": "momentum"}),
    Chart(SCHEDULES, "Temperature of the teacher", "The lower, the more certain its targets.",
          {"schedule/teacher_temperature": "temperature"}),
    Chart(COLLAPSE, "Entropy of the teacher", "In nats: of its output for one crop, of the mean output over a batch. "
          "A healthy run keeps a gap between the two curves: it is what an output tells about its image. Where they "
          "meet, there is one output for all images: at the upper line every prototype gets the same, at 0 one gets "
          "all.",
          {"collapse/mean_output_entropy": "mean output", "collapse/teacher_entropy": "one crop"}),
    Chart(COLLAPSE, "Teacher against student", "Kullback-Leibler divergence of the student's output from the "
          "teacher's, in nats. At 0 there is nothing left to learn, as after a collapse.",
          {"collapse/teacher_student_kl": "divergence"}, log=True),
    Chart(COLLAPSE, "Mean output against uniform", "Kullback-Leibler divergence of the mean output of a batch from an "
          "equal share for each prototype, in nats. At 0 prototypes are used evenly; at the upper line one gets all. "
          "A batch with few crops for its prototypes cannot reach 0.",
          {"collapse/kl_to_uniform": "divergence"}),
    Chart(COLLAPSE, "Dead prototypes", "Share that got less than 1 % of an equal share since the last point. With few "
          "logged crops for each prototype, many look dead that are not.",
          {"collapse/dead_prototypes": "dead"}, zero=True),
    Chart(COLLAPSE, "Spread of the features", "Standard deviation over a batch of the normalised features, mean over "
          "dimensions. At 0 all images look the same. Below the alarm line, and at less than half of its first value, "
          "it counts as a collapse.", {"collapse/feature_std": "spread"}, zero=True),
    Chart(COLLAPSE, "Effective rank of the features", "In how many directions the features of the epoch's logged steps "
          "go (RankMe): exp of the entropy of their singular values, at most their width. It should not fall to a few.",
          {"collapse/effective_rank": "directions"}, zero=True),
    Chart(COLLAPSE, "Length of the centre", "It should level off; if it grows without end, one prototype is winning.",
          {"collapse/center_norm": "length"}),
    Chart(COLLAPSE, "Alarm", "1 from the row after a collapse is seen, as long as it lasts.",
          {"collapse/alarm": "alarm"}, zero=True),
    Chart("Speed", "Images per second", "Over all devices, waiting for data included.",
          {"speed/images_per_second": "images/s"}, zero=True),
]  # fmt: skip
SECTIONS = [*dict.fromkeys(chart.section for chart in CHARTS), OTHERS]


def charts_of(run: Run) -> list[Chart]:
    """The charts that the run has curves for; columns that no chart knows get one each, at the end."""
    by_k = sorted((c for c in run.curves if c.startswith("knn/top1_k")), key=lambda c: (len(c), c))
    ks = {column: f"k = {column.removeprefix('knn/top1_k')}" for column in by_k}
    text = "Top-1, in percent, by the number of neighbours that vote."
    several = [Chart(LEARNING, "k-NN by neighbours", text, ks)] if len(ks) > 1 else []
    known = {column for chart in CHARTS for column in chart.columns}
    others = [
        Chart(OTHERS, column, "", {column: column}, log=_spans(run.curves[column], WIDE_RANGE))
        for column in run.curves
        if column not in known and not column.startswith("knn/top")
    ]
    charts = sorted([*CHARTS, *several, *others], key=lambda chart: SECTIONS.index(chart.section))
    return [chart for chart in charts if any(column in run.curves for column in chart.columns)]


def _spans(curve: Curve, times: float) -> bool:
    values = [value for _, value in curve]
    return min(values) > 0 and max(values) >= times * min(values)


def references(run: Run, chart: Chart) -> list[dict[str, Any]]:
    """Horizontal lines that a chart is read against."""
    K, D = finite(run.setting("method.out_dim")), run.number("feature_dim")
    ln_K = math.log(K) if K and K > 0 else None
    even = 1 / math.sqrt(D) if D and D > 0 else None
    lines: list[tuple[float | None, str]] = []
    if "collapse/teacher_entropy" in chart.columns:
        lines = [(ln_K, f"ln {K:.0f}: all prototypes alike" if K else ""), (0.0, "0: one prototype")]
    elif "collapse/kl_to_uniform" in chart.columns:
        lines = [(ln_K, f"ln {K:.0f}: one prototype" if K else ""), (0.0, "0: all prototypes alike")]
    elif "collapse/feature_std" in chart.columns:
        alarm = LEAST_SPREAD * even if even else None
        lines = [(even, "1/√D: evenly spread"), (alarm, "alarm"), (0.0, "0: collapsed")]
    elif "collapse/effective_rank" in chart.columns:
        lines = [(LEAST_RANK, "alarm")]
    elif "knn/top1" in chart.columns:
        untrained, pixels = run.number("knn_top1_untrained"), run.number("knn_top1_pixels")
        lines = [(untrained, "untrained, top-1"), (pixels, "raw pixels, top-1")]
    return [{"value": value, "label": label} for value, label in lines if value is not None]


def curves_html(run: Run) -> str:
    """All charts by section, without their lines: the page's script draws them from `curves_json`."""
    charts = charts_of(run)
    if not charts:
        return _section("Curves", '<p class="soft">There are no curves: metrics.csv is missing or empty.</p>')
    sections = []
    for title, group in groupby(charts, key=lambda chart: chart.section):
        figures = "".join(_chart_html(run, chart) for chart in group)
        lead = ("" if sections else HINT) + (_found(run) if title == COLLAPSE else "")
        sections.append(_section(title, f'{lead}<div class="charts">{figures}</div>'))
    return "".join(sections)


def _found(run: Run) -> str:
    found = run.summary.get("collapse")
    return f"<p>Collapse: {escape(str(found))}. What to change stands in docs/collapse.md.</p>" if found else ""


def curves_json(run: Run) -> str:
    """Points and reference lines of `curves_html`, in its order, for a script element."""
    charts = [
        {"series": _series(run, chart), "references": references(run, chart), "zero": chart.zero}
        for chart in charts_of(run)
    ]
    text = json.dumps({"epochs": run.epochs, "charts": charts}, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")  # so that no value can close the element


def thinned(curve: Curve) -> Curve:
    """At most `MOST_POINTS` of a curve's own points, its first, last, peaks and troughs among them."""
    if len(curve) <= MOST_POINTS:
        return curve
    parts = MOST_POINTS // 2 - 1
    kept = {curve[0], curve[-1]}
    for part in range(parts):
        some = curve[part * len(curve) // parts : (part + 1) * len(curve) // parts]
        kept |= {min(some, key=lambda point: point[1]), max(some, key=lambda point: point[1])}
    return sorted(kept)


def _series(run: Run, chart: Chart) -> list[dict[str, Any]]:
    present = [(column, name) for column, name in chart.columns.items() if column in run.curves]
    # Single steps are noise behind the mean of an epoch, where there is one.
    thin = {"train/loss"} if len(present) > 1 else set()
    return [
        {"name": name, "color": i % COLOURS, "thin": column in thin, "points": thinned(run.curves[column])}
        for i, (column, name) in enumerate(present)
    ]


def _chart_html(run: Run, chart: Chart) -> str:
    series = _series(run, chart)
    checked = " checked" if chart.log else ""
    can_log = _spans([point for one in series for point in one["points"]], LOG_RANGE)
    log = f'<label><input type="checkbox"{checked}>log</label>' if can_log else ""
    readings = "".join(
        f'<span><i style="background:var(--s{one["color"]})"></i>{escape(one["name"])} '
        f"<b>{one['points'][-1][1]:.5g}</b></span>"
        for one in series
    )
    last = max(one["points"][-1][0] for one in series)
    text = f"<p>{escape(chart.text)}</p>" if chart.text else ""
    return (
        f'<figure class="card chart"><figcaption><div class="head"><h3>{escape(chart.title)}</h3>{log}</div>{text}'
        f'</figcaption><output aria-live="off"><span class="at">step {last:,}</span>{readings}</output>'
        f'<div class="plot" tabindex="0" role="img" aria-label="{escape(_spoken(chart, series))}"></div></figure>'
    )


def _spoken(chart: Chart, series: list[dict[str, Any]]) -> str:
    parts = []
    for one in series:
        (first, start), (last, end) = one["points"][0], one["points"][-1]
        low, high = (pick(value for _, value in one["points"]) for pick in (min, max))
        parts.append(
            f"{one['name']} from {start:.5g} at step {first:,} to {end:.5g} at step {last:,}, "
            f"between {low:.5g} and {high:.5g}"
        )
    return f"{chart.title}: {'; '.join(parts)}."


def _section(title: str, content: str) -> str:
    name = title.lower().replace(" ", "-")
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{content}</section>'
