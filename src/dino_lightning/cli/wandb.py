"""`dino wandb`, `python -m dino_lightning.cli.wandb`: a saved view of a project at Weights & Biases.

    dino wandb                                    of dino-lightning, for the user or team of the key
    dino wandb --project photos --entity my-team  of another
    dino wandb --report                           and a report that compares its runs

Each call makes a new view; what others have arranged stays as it is. What stands in it: `sections.py`.
Exit status: 0, or 2 where W&B cannot be reached, has no such project, or its package is missing.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from dino_lightning.config import WandbLoggerConfig
from dino_lightning.errors import UserError
from dino_lightning.loggers.wandb import missing_key_message
from dino_lightning.report.wandb_workspace import EXTRA, default_entity, save_report, save_view


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        check()
        entity = options.entity or default_entity()
        url = save_view(entity, options.project, name=options.name)
        print(f"View: {url}")
        if options.report:
            print(f"Report: {save_report(entity, options.project, name=options.name)}")
    except UserError as error:
        print(f"dino wandb: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="dino wandb", description="A saved view of a project at Weights & Biases.")
    parser.add_argument("--project", default=WandbLoggerConfig.project, help="default: %(default)s")
    parser.add_argument("--entity", help="user or team; the key's default one if left out")
    parser.add_argument("--name", default="DINO", help="of the view; default: %(default)s")
    parser.add_argument("--report", action="store_true", help="save a report that compares the project's runs, too")
    return parser.parse_args(argv)


def check() -> None:
    """Refuse to start without the package or a key: W&B would ask for one and wait."""
    if find_spec("wandb_workspaces") is None:
        raise UserError(f"dino wandb needs the package wandb-workspaces; install it ({EXTRA}).")
    problem = missing_key_message()
    if problem is not None:
        raise UserError(f"{problem}; a view is saved online.")
    os.environ.setdefault("WANDB_SILENT", "true")  # it prints addresses of its own


if __name__ == "__main__":
    sys.exit(main())
