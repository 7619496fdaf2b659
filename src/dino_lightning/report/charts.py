"""The catalog of charts, for the HTML report and the W&B workspace: their metrics, meaning and reference lines."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from dino_lightning.methods.collapse import MIN_RANK, MIN_SPREAD
from dino_lightning.report.run_folder import Run, to_finite

LOG_FACTOR = 1000
"""An unknown metric whose maximum is at least this many times its minimum starts on a logarithmic axis."""


@dataclass(frozen=True)
class Chart:
    """A chart over the optimizer steps. W&B shows title and unit, the report title and text."""

    section: str
    title: str
    text: str
    columns: dict[str, str]
    """Logged metric -> its name in the legend."""
    unit: str = ""
    log: bool = False
    """Start on a logarithmic axis."""
    zero: bool = False
    """Include 0 in the axis."""


LEARNING, SCHEDULES, COLLAPSE, SPEED, NORMS = "Learning", "Schedules", "Signs of collapse", "Speed", "Norms"
OTHER = "Everything else"

CHARTS = [
    Chart(
        LEARNING,
        "Training loss",
        "The loss of the method; for DINO the cross-entropy between teacher and student, in nats. It should fall, but "
        "it also changes when the teacher's output becomes sharper or flatter.",
        {"train/loss": "one step", "train/loss_epoch": "mean of the epoch"},
    ),
    Chart(
        LEARNING,
        "k-NN accuracy",
        "Correctly classified validation images, in percent: the most reliable figure. It should rise, fastest at "
        "first.",
        {"knn/top1": "top-1", "knn/top5": "top-5"},
        unit="%",
    ),
    Chart(SCHEDULES, "Learning rate", "Linear warm-up, then half a cosine.", {"schedule/lr": "learning rate"}),
    Chart(SCHEDULES, "Weight decay", "Half a cosine.", {"schedule/weight_decay": "weight decay"}),
    Chart(
        SCHEDULES,
        "Momentum of the teacher",
        "Share of the teacher's weights that each step keeps.",
        {"schedule/teacher_momentum": "momentum"},
    ),
    Chart(
        SCHEDULES,
        "Temperature of the teacher",
        "A lower temperature makes the targets sharper.",
        {"schedule/teacher_temperature": "temperature"},
    ),
    Chart(
        COLLAPSE,
        "Entropy of the teacher",
        "In nats: of the output for one crop, and of the mean output over a batch. A healthy run keeps a gap between "
        "the curves, which is the information of an output about its image. If they meet, all images have the same "
        "output: all prototypes equally at the upper line, a single prototype at 0.",
        {"collapse/mean_output_entropy": "mean output", "collapse/teacher_entropy": "one crop"},
        unit="nats",
    ),
    Chart(
        COLLAPSE,
        "Teacher against student",
        "Kullback-Leibler divergence of the student's output from the teacher's, in nats. At 0 there is nothing left "
        "to learn, as after a collapse.",
        {"collapse/teacher_student_kl": "divergence"},
        unit="nats",
        log=True,
    ),
    Chart(
        COLLAPSE,
        "Mean output against uniform",
        "Kullback-Leibler divergence of the mean output of a batch from the uniform distribution, in nats. At 0 all "
        "prototypes are used equally; at the upper line only one is used. A batch with fewer crops than prototypes "
        "cannot reach 0.",
        {"collapse/kl_to_uniform": "divergence"},
        unit="nats",
    ),
    Chart(
        COLLAPSE,
        "Dead prototypes",
        "Share of prototypes that got less than 1 % of a uniform share since the last point. With few logged crops per "
        "prototype, this overestimates it.",
        {"collapse/dead_prototypes": "dead"},
        unit="share",
        zero=True,
    ),
    Chart(
        COLLAPSE,
        "Spread of the features",
        "Standard deviation of the normalized features over a batch, averaged over dimensions. At 0 all images have "
        "the same features. Below the alarm line, and below half of its first value, it counts as a collapse.",
        {"collapse/feature_std": "spread"},
        zero=True,
    ),
    Chart(
        COLLAPSE,
        "Effective rank of the features",
        "Number of directions in the features of the epoch's logged steps (RankMe): exp of the entropy of their "
        "singular values, at most their width. It should not fall to a few.",
        {"collapse/effective_rank": "directions"},
        zero=True,
    ),
    Chart(
        COLLAPSE,
        "Length of the center",
        "It should level off; if it keeps growing, one prototype dominates.",
        {"collapse/center_norm": "length"},
    ),
    Chart(
        COLLAPSE,
        "Alarm",
        "1 from the row after a collapse is detected, as long as it lasts.",
        {"collapse/alarm": "alarm"},
        zero=True,
    ),
    Chart(
        SPEED,
        "Images per second",
        "Over all devices, including the time waiting for data.",
        {"speed/images_per_second": "images/s"},
        zero=True,
    ),
    Chart(
        SPEED,
        "Waiting for data",
        "Share of the time that training waits for images.",
        {"speed/data_wait_share": "waiting"},
        unit="share",
        zero=True,
    ),
    Chart(
        SPEED,
        "Model FLOPs utilization",
        "Share of the peak FLOPs of the devices.",
        {"speed/mfu": "utilization"},
        unit="share",
        zero=True,
    ),
    Chart(SPEED, "Peak GPU memory", "In GiB.", {"speed/gpu_memory_gib": "memory"}, unit="GiB", zero=True),
    Chart(NORMS, "Norm of the gradient", "Before clipping.", {"norm/gradient": "gradient"}, log=True),
    Chart(NORMS, "Norm of the weights", "", {"norm/student": "student", "norm/teacher": "teacher"}),
    Chart(NORMS, "Non-finite steps", "Steps with NaN or infinite values.", {"nonfinite/steps": "steps"}, zero=True),
    Chart(NORMS, "Loss scale of fp16", "", {"amp/scale": "scale"}, log=True),
]
SECTIONS = [*dict.fromkeys(chart.section for chart in CHARTS), OTHER]


class ReferenceLine(NamedTuple):
    """A horizontal line to compare a curve with."""

    value: float
    label: str


def charts_for(runs: Sequence[Run]) -> list[Chart]:
    """The charts with a curve in any of the runs; each metric that is not in the catalog gets its own, at the end."""
    present = dict.fromkeys(column for run in runs for column in run.curves)
    by_k = sorted((c for c in present if c.startswith("knn/top1_k")), key=lambda c: (len(c), c))
    ks = {column: f"k = {column.removeprefix('knn/top1_k')}" for column in by_k}
    text = "Top-1, in percent, by the number of neighbors that vote."
    knn_by_k = [Chart(LEARNING, "k-NN by neighbors", text, ks)] if len(ks) > 1 else []
    known = {column for chart in CHARTS for column in chart.columns}
    others = [
        Chart(OTHER, column, "", {column: column}, log=spans_factor(_values(runs, column), factor=LOG_FACTOR))
        for column in present
        if column not in known and not column.startswith("knn/top")
    ]
    charts = sorted([*CHARTS, *knn_by_k, *others], key=lambda chart: SECTIONS.index(chart.section))
    return [chart for chart in charts if any(column in present for column in chart.columns)]


def one_chart_per_column(runs: Sequence[Run]) -> list[Chart]:
    """The charts of several runs: one for each metric, because colors distinguish the runs."""
    charts = []
    for chart in charts_for(runs):
        columns = {c: name for c, name in chart.columns.items() if any(c in run.curves for run in runs)}
        for column, name in columns.items():
            title = f"{chart.title}: {name}" if len(chart.columns) > 1 else chart.title
            charts.append(replace(chart, title=title, columns={column: name}))
    return charts


def _values(runs: Sequence[Run], column: str) -> list[float]:
    return [value for run in runs for _, value in run.curves.get(column, [])]


def spans_factor(values: Sequence[float], *, factor: float) -> bool:
    """Whether all values are positive and the maximum is at least `factor` times the minimum."""
    return min(values) > 0 and max(values) >= factor * min(values)


def reference_lines(run: Run, chart: Chart) -> list[ReferenceLine]:
    """The reference lines of a chart of this run."""
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
    """The reference lines that are the same for all runs."""
    first, *others = (reference_lines(run, chart) for run in runs)
    return [line for line in first if all(line in lines for lines in others)]
