"""The charts of a report: which columns of `metrics.csv` stand in one, what each means, and what it is read against."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dino_lightning.methods.collapse import MIN_RANK, MIN_SPREAD
from dino_lightning.report.run_folder import Run, to_finite

LOG_FACTOR = 1000
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
OTHER = "Everything else"

CHARTS = [
    Chart(
        LEARNING,
        "Training loss",
        "What the method makes small; of DINO the cross-entropy between teacher and "
        "student, in nats. It should fall, though a teacher that grows more certain or less so moves it, too.",
        {"train/loss": "one step", "train/loss_epoch": "mean of the epoch"},
    ),
    Chart(
        LEARNING,
        "k-NN accuracy",
        "Correct validation images, in percent: the figure to trust. It should rise, steeply at first.",
        {"knn/top1": "top-1", "knn/top5": "top-5"},
    ),
    Chart(SCHEDULES, "Learning rate", "Linear warm-up, then half a cosine.", {"schedule/lr": "learning rate"}),
    Chart(SCHEDULES, "Weight decay", "Half a cosine.", {"schedule/weight_decay": "weight decay"}),
    Chart(
        SCHEDULES,
        "Momentum of the teacher",
        "Share of the teacher's old weights that each step keeps.",
        {"schedule/teacher_momentum": "momentum"},
    ),
    Chart(
        SCHEDULES,
        "Temperature of the teacher",
        "The lower, the more certain its targets.",
        {"schedule/teacher_temperature": "temperature"},
    ),
    Chart(
        COLLAPSE,
        "Entropy of the teacher",
        "In nats: of its output for one crop, of the mean output over a batch. "
        "A healthy run keeps a gap between the two curves: it is what an output tells about its image. Where they "
        "meet, there is one output for all images: at the upper line every prototype gets the same, at 0 one gets "
        "all.",
        {"collapse/mean_output_entropy": "mean output", "collapse/teacher_entropy": "one crop"},
    ),
    Chart(
        COLLAPSE,
        "Teacher against student",
        "Kullback-Leibler divergence of the student's output from the "
        "teacher's, in nats. At 0 there is nothing left to learn, as after a collapse.",
        {"collapse/teacher_student_kl": "divergence"},
        log=True,
    ),
    Chart(
        COLLAPSE,
        "Mean output against uniform",
        "Kullback-Leibler divergence of the mean output of a batch from an "
        "equal share for each prototype, in nats. At 0 prototypes are used evenly; at the upper line one gets all. "
        "A batch with few crops for its prototypes cannot reach 0.",
        {"collapse/kl_to_uniform": "divergence"},
    ),
    Chart(
        COLLAPSE,
        "Dead prototypes",
        "Share that got less than 1 % of an equal share since the last point. With few "
        "logged crops for each prototype, many look dead that are not.",
        {"collapse/dead_prototypes": "dead"},
        zero=True,
    ),
    Chart(
        COLLAPSE,
        "Spread of the features",
        "Standard deviation over a batch of the normalized features, mean over "
        "dimensions. At 0 all images look the same. Below the alarm line, and at less than half of its first value, "
        "it counts as a collapse.",
        {"collapse/feature_std": "spread"},
        zero=True,
    ),
    Chart(
        COLLAPSE,
        "Effective rank of the features",
        "In how many directions the features of the epoch's logged steps "
        "go (RankMe): exp of the entropy of their singular values, at most their width. It should not fall to a few.",
        {"collapse/effective_rank": "directions"},
        zero=True,
    ),
    Chart(
        COLLAPSE,
        "Length of the center",
        "It should level off; if it grows without end, one prototype is winning.",
        {"collapse/center_norm": "length"},
    ),
    Chart(
        COLLAPSE,
        "Alarm",
        "1 from the row after a collapse is seen, as long as it lasts.",
        {"collapse/alarm": "alarm"},
        zero=True,
    ),
    Chart(
        "Speed",
        "Images per second",
        "Over all devices, waiting for data included.",
        {"speed/images_per_second": "images/s"},
        zero=True,
    ),
]
SECTIONS = [*dict.fromkeys(chart.section for chart in CHARTS), OTHER]


@dataclass(frozen=True)
class ReferenceLine:
    """A horizontal line that a chart is read against."""

    value: float
    label: str


def charts_for(runs: Sequence[Run]) -> list[Chart]:
    """The charts that any of the runs has curves for; columns that no chart knows get one each, at the end."""
    present = dict.fromkeys(column for run in runs for column in run.curves)
    by_k = sorted((c for c in present if c.startswith("knn/top1_k")), key=lambda c: (len(c), c))
    ks = {column: f"k = {column.removeprefix('knn/top1_k')}" for column in by_k}
    text = "Top-1, in percent, by the number of neighbors that vote."
    several = [Chart(LEARNING, "k-NN by neighbors", text, ks)] if len(ks) > 1 else []
    known = {column for chart in CHARTS for column in chart.columns}
    others = [
        Chart(OTHER, column, "", {column: column}, log=_starts_on_log(runs, column))
        for column in present
        if column not in known and not column.startswith("knn/top")
    ]
    charts = sorted([*CHARTS, *several, *others], key=lambda chart: SECTIONS.index(chart.section))
    return [chart for chart in charts if any(column in present for column in chart.columns)]


def one_chart_per_column(runs: Sequence[Run]) -> list[Chart]:
    """The charts for runs on top of each other: one for each column, since a color there is a run."""
    found = []
    for chart in charts_for(runs):
        columns = {c: name for c, name in chart.columns.items() if any(c in run.curves for run in runs)}
        for column, name in columns.items():
            title = f"{chart.title}: {name}" if len(chart.columns) > 1 else chart.title
            found.append(replace(chart, title=title, columns={column: name}))
    return found


def _starts_on_log(runs: Sequence[Run], column: str) -> bool:
    return spans_factor([value for run in runs for _, value in run.curves.get(column, [])], times=LOG_FACTOR)


def spans_factor(values: Sequence[float], *, times: float) -> bool:
    """Whether all are positive and the largest is `times` the smallest."""
    return min(values) > 0 and max(values) >= times * min(values)


def reference_lines(run: Run, chart: Chart) -> list[ReferenceLine]:
    """Horizontal lines that a chart is read against."""
    K, D = to_finite(run.setting("method.out_dim")), run.number("feature_dim")
    ln_K = math.log(K) if K and K > 0 else None
    even = 1 / math.sqrt(D) if D and D > 0 else None
    lines: list[tuple[float | None, str]] = []
    if {"collapse/teacher_entropy", "collapse/mean_output_entropy"} & chart.columns.keys():
        lines = [(ln_K, f"ln {K:.0f}: all prototypes alike" if K else ""), (0.0, "0: one prototype")]
    elif "collapse/kl_to_uniform" in chart.columns:
        lines = [(ln_K, f"ln {K:.0f}: one prototype" if K else ""), (0.0, "0: all prototypes alike")]
    elif "collapse/feature_std" in chart.columns:
        alarm = MIN_SPREAD * even if even else None
        lines = [(even, "1/√D: evenly spread"), (alarm, "alarm"), (0.0, "0: collapsed")]
    elif "collapse/effective_rank" in chart.columns:
        lines = [(MIN_RANK, "alarm")]
    elif "knn/top1" in chart.columns:
        untrained, pixels = run.number("knn_top1_untrained"), run.number("knn_top1_pixels")
        lines = [(untrained, "untrained, top-1"), (pixels, "raw pixels, top-1")]
    return [ReferenceLine(value, label) for value, label in lines if value is not None]


def shared_reference_lines(runs: Sequence[Run], chart: Chart) -> list[ReferenceLine]:
    """Those that are the same for all of the runs."""
    first, *others = (reference_lines(run, chart) for run in runs)
    return [line for line in first if all(line in lines for lines in others)]
