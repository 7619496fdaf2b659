"""Lines, warnings and progress bars on stderr, and fewer messages of the libraries."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

EXPECTED_WARNINGS = (
    ".*does not have many workers.*",
    ".*`val_dataloader`.*",
    ".*exists and is not empty.*",
    ".*but CUDA is not available.*",
    ".*pin_memory.*",
    ".*LeafSpec.*",
    ".*smaller than the logging interval.*",
    ".*returned a view tensor.*",
    ".*has `__len__` defined.*",
)
"""Warnings about settings that are intended here, or that this package reports in its own words."""


def quieten_libraries() -> None:
    """Hide Lightning and PyTorch messages that the user cannot act on."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def say(text: str) -> None:
    """Print a line on stderr, ignoring a failure: stderr is often a log file on the disk that is full."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a line that starts with `WARNING:` on stderr."""
    say(f"WARNING: {text}")


@contextmanager
def progress(description: str, *, total: int, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a progress bar with the remaining time on stderr; call the yielded function with the finished units.

    Nothing is shown if stderr is not a terminal, because a bar would leave only empty lines there.
    """
    from rich.console import Console  # imports slowly, and signals are handled before
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, force_jupyter=False)  # its Jupyter bars need ipywidgets
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda units: bar.advance(task, units)
