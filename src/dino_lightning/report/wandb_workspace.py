"""What stands where in the view: sections from the top down, and their charts."""

import os
from dataclasses import dataclass
from typing import Any

import wandb

from dino_lightning.errors import UserError
from dino_lightning.loggers.wandb import STEP_METRIC


@dataclass(frozen=True)
class Chart:
    """Curves over the optimizer steps, or pictures with a slider over time."""

    title: str
    names: tuple[str, ...]
    """Names under which they are logged."""
    log: bool = False
    """Whether the vertical axis is logarithmic."""
    pictures: bool = False


@dataclass(frozen=True)
class Section:
    """Charts that belong together."""

    title: str
    charts: tuple[Chart, ...]
    is_open: bool = True
    """Whether the charts are shown before anybody asks for them."""


SECTIONS = (
    Section(
        "Loss and k-NN",
        (
            Chart("Loss", ("train/loss_epoch", "train/loss")),
            Chart("k-NN top-1 (%)", ("knn/top1",)),
            Chart("k-NN top-5 (%)", ("knn/top5",)),
        ),
    ),
    Section(
        "Schedules",
        (
            Chart("Learning rate", ("schedule/lr",)),
            Chart("Weight decay", ("schedule/weight_decay",)),
            Chart("Momentum of the teacher", ("schedule/teacher_momentum",)),
            Chart("Temperature of the teacher", ("schedule/teacher_temperature",)),
        ),
        is_open=False,
    ),
    Section(
        "Collapse",
        (
            Chart("Entropy of the teacher (nats)", ("collapse/mean_output_entropy", "collapse/teacher_entropy")),
            Chart("Teacher against student (nats)", ("collapse/teacher_student_kl",), log=True),
            Chart("Mean output against uniform (nats)", ("collapse/kl_to_uniform",)),
            Chart("Dead prototypes (share)", ("collapse/dead_prototypes",)),
            Chart("Spread of the features", ("collapse/feature_std",)),
            Chart("Effective rank of the features", ("collapse/effective_rank",)),
            Chart("Length of the center", ("collapse/center_norm",)),
            Chart("Alarm", ("collapse/alarm",)),
        ),
    ),
    Section(
        "Speed",
        (
            Chart("Images per second", ("speed/images_per_second",)),
            Chart("Share of time spent waiting for data", ("speed/data_wait_share",)),
            Chart("Model FLOPs utilisation (share of the peak)", ("speed/mfu",)),
            Chart("GPU memory, most in use (GiB)", ("speed/gpu_memory_gib",)),
        ),
    ),
    Section(
        "Pictures",
        (
            Chart("Attention", ("pictures/attention",), pictures=True),
            Chart("Principal components of the patches", ("pictures/pca",), pictures=True),
            Chart("Nearest neighbors", ("pictures/neighbors",), pictures=True),
            Chart("Crops", ("pictures/crops",), pictures=True),
        ),
    ),
    Section(
        "Norms",
        (
            Chart("Gradient, before clipping", ("norm/gradient",), log=True),
            Chart("Weights", ("norm/student", "norm/teacher")),
            Chart("Steps that were not finite", ("nonfinite/steps",)),
            Chart("Loss scale of fp16", ("amp/scale",), log=True),
        ),
        is_open=False,
    ),
    Section(
        "System",
        (
            Chart("GPU in use (%)", ("system/gpu.0.gpu",)),
            Chart("GPU memory (%)", ("system/gpu.0.memoryAllocated",)),
            Chart("CPU (%)", ("system/cpu",)),
            Chart("Memory of the process (MB)", ("system/proc.memory.rssMB",)),
        ),
        is_open=False,
    ),
)
"""W&B itself logs `system/...`."""


EXTRA = 'pip install "dino-lightning[wandb-workspaces]"'


ANSWERS_WITHIN_S = 30


def default_entity() -> str:
    """The user or team that W&B takes for this key."""
    try:
        entity = wandb.Api(timeout=ANSWERS_WITHIN_S).default_entity
    except Exception as error:
        raise _refused(error) from error
    if not entity:
        raise UserError("W&B names no default user or team for this key; name one with --entity.")
    return entity


def save_view(entity: str, project: str, *, name: str) -> str:
    """Save the view; its address."""
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(name=section.title, panels=[panel(chart) for chart in section.charts], is_open=section.is_open)
        for section in SECTIONS
    ]
    view = ws.Workspace(entity=entity, project=project, name=name, sections=sections)
    try:
        return view.save().url
    except Exception as error:
        raise _refused(error) from error


def save_report(entity: str, project: str, *, name: str) -> str:
    """Save a report with the charts of all runs; its address."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = []
    for section in SECTIONS:
        runs = wr.Runset(entity=entity, project=project)
        grid = wr.PanelGrid(runsets=[runs], panels=[panel(chart) for chart in section.charts])
        blocks += [wr.H2(text=section.title), grid]
    report = wr.Report(entity=entity, project=project, title=f"{name}: runs compared", blocks=blocks)
    try:
        return report.save().url
    except Exception as error:
        raise _refused(error) from error


def panel(chart: Chart) -> Any:
    """A chart as W&B has it."""
    import wandb_workspaces.reports.v2 as wr

    if chart.pictures:
        return wr.MediaBrowser(title=chart.title, media_keys=list(chart.names), num_columns=1)
    x = "Step" if chart.names[0].startswith("system/") else STEP_METRIC
    return wr.LinePlot(title=chart.title, x=x, y=list(chart.names), log_y=chart.log)


def _refused(error: Exception) -> UserError:
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return UserError(f"{host} has not saved it ({' '.join(str(error).split())}); check key, --entity and --project.")
