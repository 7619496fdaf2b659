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
    """Where metrics go besides `metrics.csv` (`dino eval`: besides `results.jsonl`); one of the children below."""


@dataclass
class CSVLoggerConfig(LoggerConfig):
    """`metrics.csv` (`dino eval`: `results.jsonl`) alone."""


@dataclass
class WandbLoggerConfig(LoggerConfig):
    """Weights & Biases (docs/wandb.md)."""

    project: Annotated[str, ProjectName] = "dino-lightning"
    """Project."""
    entity: str | None = None
    """User or team; null for the default one of the key."""
    name: str | None = None
    """Name of the run; null takes the name of the output folder, in a sweep with the sweep's before it."""
    group: str | None = None
    """Group of runs; null takes, in a sweep (`--multirun`), the name of its folder."""
    tags: list[str] = field(default_factory=list)
    """Tags."""
    mode: Annotated[str, OneOf(*WANDB_MODES)] = "offline"
    """`offline` (no account needed; `wandb sync` uploads later), `online` or `disabled`. Where W&B cannot be reached,
    an online run goes on offline."""
    artifacts: bool = True
    """Keep the exported weights as an artifact of type `model`; `dino eval` names the artifact it has evaluated."""
    start_timeout_s: Annotated[float, Positive] = 60.0
    """Seconds that the start of a run waits for W&B."""
    end_timeout_s: Annotated[float, Positive] = 300.0
    """Seconds that the end of a run waits for uploads; `wandb sync` has the rest."""


@dataclass
class TensorBoardLoggerConfig(LoggerConfig):
    """TensorBoard event files under `tensorboard/`."""
