"""`dino report`, `python -m dino_lightning.cli.report`: a page about a run, or about several next to each other.

    dino report outputs/quick-20261124-154205                 its report.html anew, with the evaluations done since
    dino report outputs/a outputs/b                           both in one page, outputs/report.html; also while they run
    dino report outputs/table7-20261124-154205                the runs of a sweep
    dino report 'outputs/quick-*' --output compare.html       a pattern

Exit status: 0, or 2 where something is not a run or the page cannot be written.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from dino_lightning.errors import UserError, cannot_be_written
from dino_lightning.report.comparison import MAX_RUNS, comparison_page
from dino_lightning.report.evaluations import find_results
from dino_lightning.report.page import run_page
from dino_lightning.report.run_folder import read_run
from dino_lightning.report.runs import common_folder, find_runs
from dino_lightning.runtime.files import write_atomically


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        written = write(options.runs, output=options.output, results=options.results)
    except UserError as error:
        print(f"dino report: {error}", file=sys.stderr)
        return 2
    Console().print(f"Report: {written}", soft_wrap=True, markup=False)  # a path in one piece can be copied
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="dino report", description="A page about a run, or about several next to each other."
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run or of a sweep, or a pattern of such")
    add("--output", type=Path, metavar="FILE.html", help="default: report.html in the run's folder, or beside several")
    add("--results", nargs="+", type=Path, default=[], metavar="FOLDER", help="of dino eval, if not beside a run")
    return parser.parse_args(argv)


def write(words: Sequence[str], *, output: Path | None = None, results: Sequence[Path] = ()) -> Path:
    """The page of the runs that are named, and where it is. Raises `UserError`."""
    folders = find_runs(words)
    if len(folders) > MAX_RUNS:
        raise UserError(f"dino report: these are {len(folders)} runs and a page takes {MAX_RUNS}; name fewer.")
    path = checked(output, default=(folders[0] if len(folders) == 1 else common_folder(folders)) / "report.html")
    several = track(folders, "Reading", console=Console(stderr=True), transient=True)
    runs = [read_run(folder, allow_partial=True) for folder in (several if len(folders) > 1 else folders)]
    found = find_results(runs, results)
    page = run_page(runs[0], found[0]) if len(runs) == 1 else comparison_page(runs, found)
    try:
        write_atomically(path, page)
    except OSError as error:
        raise cannot_be_written("--output", path, error) from error
    return path


def checked(output: Path | None, *, default: Path) -> Path:
    """Where the page goes. Raises `UserError` for what is no place for one."""
    path = output or default
    if path.suffix not in (".html", ".htm"):
        named = path.with_suffix(".html") if path.name else path / "report.html"
        raise UserError(f"--output {path}: the page is an HTML file; name it {named}")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}; name a file in a folder that exists")
    return path


if __name__ == "__main__":
    sys.exit(main())
