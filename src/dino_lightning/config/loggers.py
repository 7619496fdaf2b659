"""Where metrics go: `logger`."""

from dataclasses import dataclass, field
from typing import Annotated

from dino_lightning.config.ranges import OneOf, Positive, Range

WANDB_MODES = ("offline", "online", "disabled")
ProjectName = Range(
    "a name of 1 to 128 characters without / \\ # ? % and :",
    lambda name: 0 < len(name) <= 128 and not set(name) & set("/\\#?%:"),
)


@dataclass
class LoggerConfig:
    """Destination of metrics in addition to `metrics.csv` (`dino eval`: in addition to `results.jsonl`); one of the
    classes below."""


@dataclass
class CSVLoggerConfig(LoggerConfig):
    """`metrics.csv` (`dino eval`: `results.jsonl`) alone."""


@dataclass
class WandbLoggerConfig(LoggerConfig):
    """Weights & Biases (docs/wandb.md)."""

    project: Annotated[str, ProjectName] = "dino-lightning"
    """Name of the project."""
    entity: str | None = None
    """User or team; null uses the default of the API key."""
    name: str | None = None
    """Name of the run; null uses the name of the output folder, in a sweep after the name of the sweep."""
    group: str | None = None
    """Group of runs; null uses the name of the folder in a sweep (`--multirun`)."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""
    mode: Annotated[str, OneOf(*WANDB_MODES)] = "offline"
    """`offline` needs no account, and `wandb sync` uploads later; `online` uploads during the run, which continues
    offline if W&B cannot be reached; `disabled` logs nothing."""
    artifacts: bool = True
    """Keep the exported weights as an artifact of type `model`; `dino eval` names the artifact it has evaluated."""
    start_timeout_s: Annotated[float, Positive] = 60.0
    """Time that the start of a run waits for W&B (seconds)."""
    end_timeout_s: Annotated[float, Positive] = 300.0
    """Time that the end of a run waits for uploads (seconds); `wandb sync` uploads the rest."""


@dataclass
class TensorBoardLoggerConfig(LoggerConfig):
    """TensorBoard event files under `tensorboard/`."""
