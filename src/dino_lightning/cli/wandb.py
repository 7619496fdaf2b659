"""A saved view of a project at Weights & Biases.

usage: dino wandb [PROJECT] [key=value]

PROJECT is project. Each call adds a view; existing views stay as they are.

Examples:
  dino wandb                                       project dino-lightning of the key's user or team
  dino wandb project=photos entity=my-team
  dino wandb report=true                           and a report that compares its runs
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec

from dino_lightning.cli.options import parse_options
from dino_lightning.errors import UserError
from dino_lightning.loggers.wandb import missing_key_message
from dino_lightning.report.wandb_workspace import EXTRA, default_entity, save_report, save_view


@dataclass
class Options:
    """Keys of `dino wandb`."""

    project: str = "dino-lightning"
    """The project at W&B."""
    entity: str | None = None
    """User or team; default: the one of the key."""
    name: str = "DINO"
    """Name of the view."""
    report: bool = False
    """Save a report that compares the runs of the project, too."""


def main(words: list[str]) -> None:
    """Save the view and print its address."""
    options = parse_options(Options, words, program="dino wandb")
    check()
    entity = options.entity or default_entity()
    print(f"View: {save_view(entity, options.project, name=options.name)}")
    if options.report:
        print(f"Report: {save_report(entity, options.project, name=options.name)}")


def check() -> None:
    """Raise `UserError` without the package or a key: W&B would ask for one and wait."""
    if find_spec("wandb_workspaces") is None:
        raise UserError(f"dino wandb needs the package wandb-workspaces; install it ({EXTRA}).")
    problem = missing_key_message()
    if problem is not None:
        raise UserError(f"{problem}; a view is saved online.")
    os.environ.setdefault("WANDB_SILENT", "true")  # W&B prints addresses, too
