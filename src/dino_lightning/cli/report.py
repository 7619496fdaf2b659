"""An HTML page about a run, or about several.

usage: dino report RUN... [key=value]

RUN is the folder of a run or of a sweep, or a pattern of such folders.

Examples:
  dino report outputs/quick-20261124-154205        its report.html, with the evaluations done since
  dino report outputs/a outputs/b                  both in one page, outputs/report.html
  dino report 'outputs/quick-*' output=compare.html
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track

from dino_lightning.cli.options import parse_options
from dino_lightning.errors import UserError, cannot_be_written
from dino_lightning.report.comparison import MAX_RUNS, comparison_page
from dino_lightning.report.evaluations import find_results
from dino_lightning.report.page import run_page
from dino_lightning.report.run_folder import read_run
from dino_lightning.report.runs import common_folder, find_runs
from dino_lightning.runtime.files import write_atomically


@dataclass
class Options:
    """Keys of `dino report`."""

    runs: list[str]
    """Folders of runs or of sweeps, or patterns of such folders: the plain words."""
    output: Path | None = None
    """FILE.html; default: report.html in the folder of the run, or in the common folder of several."""
    results: list[Path] = field(default_factory=list)
    """Folder of evaluations that are not next to a run; [A,B] for several."""


def main(words: list[str]) -> None:
    """Write the page."""
    options = parse_options(Options, words, program="dino report")
    written = write(options.runs, output=options.output, results=options.results)
    Console().print(f"Report: {written}", soft_wrap=True, markup=False)  # a path in one piece can be copied


def write(runs: Sequence[str], *, output: Path | None = None, results: Sequence[Path] = ()) -> Path:
    """Write the page about some runs and return its path. Raises `UserError`."""
    folders = find_runs(runs)
    if len(folders) > MAX_RUNS:
        raise UserError(f"these are {len(folders)} runs and a page takes {MAX_RUNS}; name fewer.")
    path = checked(output, default=(folders[0] if len(folders) == 1 else common_folder(folders)) / "report.html")
    tracked = track(folders, "Reading", console=Console(stderr=True), transient=True, disable=len(folders) == 1)
    runs_read = [read_run(folder, allow_partial=True) for folder in tracked]
    found = find_results(runs_read, results)
    page = run_page(runs_read[0], found[0]) if len(runs_read) == 1 else comparison_page(runs_read, found)
    try:
        write_atomically(path, page)
    except OSError as error:
        raise cannot_be_written("output", path, error) from error
    return path


def checked(output: Path | None, *, default: Path) -> Path:
    """The path of the page. Raises `UserError` if no page can be there."""
    path = output or default
    if path.suffix not in (".html", ".htm"):
        better = path.with_suffix(".html") if path.name else path / "report.html"
        raise UserError(f"output={path}: the page is an HTML file; name it {better}")
    if not path.parent.is_dir():
        raise UserError(f"output={path}: there is no folder {path.parent}; name a file in a folder that exists")
    return path
