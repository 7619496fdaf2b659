"""`dino table`, `python -m dino_lightning.cli.table`: the runs of a sweep in one table, next to the paper's figures.

    dino table outputs/table7-20261124-154205                      also while it runs, or where runs failed
    dino table outputs/optuna-20261124-154205 --plot               k-NN over what was swept: FOLDER/sweep.svg
    dino table FOLDER FOLDER --markdown                            for a document
    dino table outputs/collapse-… --curves collapse.svg            entropy and KL over the steps, as in figure 7

Exit status: 0, or 2 where a folder holds no runs.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from dino_lightning.errors import UserError
from dino_lightning.report.sweeps.collapse_curves import curves_svg
from dino_lightning.report.sweeps.jobs import read_jobs, read_rows
from dino_lightning.report.sweeps.picture import sweep_svg
from dino_lightning.report.sweeps.points import sweep_of
from dino_lightning.report.sweeps.table import markdown_table, terminal_table
from dino_lightning.runtime.files import write_atomically

PLOT = "sweep.svg"
BESIDE = ""
"""Of `--plot`: a file of this name in the folder of the sweep."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        rows = read_rows(options.folders)
        if not rows:
            raise UserError(f"{', '.join(map(str, options.folders))}: no run has started yet.")
        if options.curves:
            write_picture("--curves", options.curves, curves_svg(rows))
        if options.plot is not None:
            write_picture("--plot", plot_path(options), sweep_svg(sweep_of(read_jobs(options.folders))))
    except UserError as error:
        print(f"dino table: {error}", file=sys.stderr)
        return 2
    if options.markdown:
        print(markdown_table(rows))
    else:
        Console().print(terminal_table(rows))
    if options.plot is not None:
        print(f"Picture: {plot_path(options)}", file=sys.stderr)
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="dino table", description="The runs of a sweep in one table, next to the paper's figures."
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a sweep (--multirun) or a run")
    parser.add_argument("--markdown", action="store_true", help="print the table for a document")
    parser.add_argument(
        "--curves", type=Path, metavar="FILE.svg", help="draw the teacher's entropy and KL(teacher‖student), too"
    )
    parser.add_argument(
        "--plot",
        nargs="?",
        const=BESIDE,
        metavar="FILE.svg",
        help=f"draw k-NN over what the sweep has set, too; without a file's name FOLDER/{PLOT}",
    )
    return parser.parse_args(argv)


def plot_path(options: argparse.Namespace) -> Path:
    """Where the picture of `--plot` goes."""
    return options.folders[0] / PLOT if options.plot == BESIDE else Path(options.plot)


def write_picture(option: str, path: Path, svg: str) -> None:
    """Write a picture; an unwritable path is the user's."""
    if path.suffix != ".svg":
        named = path.with_suffix(".svg") if path.name else path / PLOT
        raise UserError(f"{option} {path}: the picture is an SVG file; name it {named}")
    try:
        write_atomically(path, svg)
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror or error}; name a file in a folder that exists") from error


if __name__ == "__main__":
    sys.exit(main())
