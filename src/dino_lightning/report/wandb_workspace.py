"""The saved W&B workspace and report: the charts of the catalog, pictures and system metrics by section."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import wandb

from dino_lightning.errors import UserError
from dino_lightning.loggers.wandb import DEFAULT_HOST, STEP_METRIC
from dino_lightning.report.charts import CHARTS, COLLAPSE, LEARNING, NORMS, SCHEDULES, SPEED, Chart
from dino_lightning.report.gallery import CAPTIONS

PICTURES, SYSTEM = "Pictures", "System"
SYSTEM_CHARTS = [
    Chart(SYSTEM, "GPU in use", "", {"system/gpu.0.gpu": "GPU"}, unit="%"),
    Chart(SYSTEM, "GPU memory", "", {"system/gpu.0.memoryAllocated": "memory"}, unit="%"),
    Chart(SYSTEM, "CPU", "", {"system/cpu": "CPU"}, unit="%"),
    Chart(SYSTEM, "Memory of the process", "", {"system/proc.memory.rssMB": "memory"}, unit="MB"),
]
"""Metrics that W&B itself logs."""
SECTIONS = {LEARNING: True, SCHEDULES: False, COLLAPSE: True, SPEED: True, PICTURES: True, NORMS: False, SYSTEM: False}
"""Section -> whether it is open at first."""
EXTRA = 'pip install "dino-lightning[wandb-workspaces]"'
TIMEOUT_S = 30


@contextmanager
def _explained() -> Iterator[None]:
    """Raise `UserError` for every error of W&B."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        host, reason = os.environ.get("WANDB_BASE_URL", DEFAULT_HOST), " ".join(str(error).split())
        raise UserError(f"{host} did not save it ({reason}); check the key, entity= and project=.") from error


@_explained()
def default_entity() -> str:
    """The default user or team of the W&B key."""
    entity = wandb.Api(timeout=TIMEOUT_S).default_entity
    if not entity:
        raise UserError("W&B has no default user or team for this key; set entity=.")
    return entity


@_explained()
def save_view(entity: str, project: str, *, name: str) -> str:
    """Save the workspace view and return its address."""
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section(name=title, panels=panels(title), is_open=is_open) for title, is_open in SECTIONS.items()]
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections).save().url


@_explained()
def save_report(entity: str, project: str, *, name: str) -> str:
    """Save a report with the charts of all runs and return its address."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = []
    for title in SECTIONS:
        runs = wr.Runset(entity=entity, project=project)
        blocks += [wr.H2(text=title), wr.PanelGrid(runsets=[runs], panels=panels(title))]
    return wr.Report(entity=entity, project=project, title=f"{name}: runs compared", blocks=blocks).save().url


def panels(section: str) -> list[Any]:
    """The W&B panels of a section."""
    import wandb_workspaces.reports.v2 as wr

    if section == PICTURES:
        return [
            wr.MediaBrowser(title=caption.title, media_keys=[f"pictures/{name}"], num_columns=1)
            for name, caption in CAPTIONS.items()
        ]
    return [
        wr.LinePlot(
            title=f"{chart.title} ({chart.unit})" if chart.unit else chart.title,
            x="Step" if section == SYSTEM else STEP_METRIC,
            y=list(chart.columns),
            log_y=chart.log,
        )
        for chart in [*CHARTS, *SYSTEM_CHARTS]
        if chart.section == section
    ]
