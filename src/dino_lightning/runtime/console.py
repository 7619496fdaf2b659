"""Leave the screen to what this package says."""

import logging
import sys
import warnings
from contextlib import suppress

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
"""About things that are on purpose here, or that are said in its own words."""


def quieten_libraries() -> None:
    """Silence the remarks of Lightning and PyTorch that a user can do nothing about."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def warn(text: str) -> None:
    """A line on stderr, if it can be written: a log often stands on the disk that is full."""
    with suppress(OSError):
        print(f"WARNING: {text}", file=sys.stderr, flush=True)
