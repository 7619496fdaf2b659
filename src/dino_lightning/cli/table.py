"""The runs of a sweep in one table, next to the paper's figures.

usage: dino table FOLDER... [key=value]

FOLDER is the folder of a sweep (--multirun) or of a run, finished or not.

Examples:
  dino table outputs/table7-20261124-154205
  dino table outputs/optuna-20261124-154205 plot=true     k-NN over what was swept: FOLDER/sweep.svg
  dino table FOLDER FOLDER format=markdown                for a document
  dino table outputs/collapse-20261124-154205 curves=collapse.svg     entropy and KL, as in figure 7
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from dino_lightning.cli.options import parse_options
from dino_lightning.errors import UserError
from dino_lightning.report.sweeps.collapse_curves import curves_svg
from dino_lightning.report.sweeps.jobs import read_jobs, read_rows
from dino_lightning.report.sweeps.picture import sweep_svg
from dino_lightning.report.sweeps.points import sweep_of
from dino_lightning.report.sweeps.table import markdown_table, terminal_table
from dino_lightning.runtime.files import write_atomically


@dataclass
class Options:
    """Keys of `dino table`."""

    folders: list[Path]
    """Folders of sweeps (`--multirun`) or of runs: the plain words."""
    format: Literal["text", "markdown"] = "text"
    """`text` for a terminal, or `markdown` for a document."""
    curves: Path | None = None
    """FILE.svg for a picture of the teacher's entropy and of KL(teacher‖student)."""
    plot: str = "false"
    """FILE.svg for a picture of k-NN over the swept settings; `true` for FOLDER/sweep.svg."""


def main(words: list[str]) -> None:
    """Print the table and write the pictures."""
    options = parse_options(Options, words, program="dino table")
    rows = read_rows(options.folders)
    if not rows:
        raise UserError(f"{', '.join(map(str, options.folders))}: no run has started yet.")
    if options.curves:
        write_picture("curves", options.curves, curves_svg(rows))
    plot = options.folders[0] / "sweep.svg" if options.plot == "true" else Path(options.plot).expanduser()
    if options.plot != "false":
        write_picture("plot", plot, sweep_svg(sweep_of(read_jobs(options.folders))))
    if options.format == "markdown":
        print(markdown_table(rows))
    else:
        Console().print(terminal_table(rows))
    if options.plot != "false":
        print(f"Picture: {plot}", file=sys.stderr)


def write_picture(key: str, path: Path, svg: str) -> None:
    """Write a picture. Raises `UserError` for a path that cannot be written."""
    if path.suffix != ".svg":
        better = path.with_suffix(".svg") if path.name else path / "sweep.svg"
        raise UserError(f"{key}={path}: the picture is an SVG file; name it {better}")
    try:
        write_atomically(path, svg)
    except OSError as error:
        raise UserError(f"{key}={path}: {error.strerror or error}; name a file in a folder that exists") from error
