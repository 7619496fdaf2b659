"""Paths among the values: those that no file can have are refused before anything looks for them."""

import errno
import os
from pathlib import Path

from dino_lightning.config.dotted import format_value
from dino_lightning.errors import UserError

PATHS = (
    "output_dir",
    "output",
    "feature_cache",
    "data.path",
    "data.root",
    "data.csv",
    "data.cache_dir",
    "data.split",
    "data.resolution",
    "data.whitening_path",
    "data.distractors_path",
    "eval.classifier",
)
"""Keys whose values are paths, or names in a folder."""


def usable_path(key: str, text: str) -> Path:
    """The path with `~` expanded. Raises `UserError` where its words alone rule it out, whatever is on the disk.

    Whether it is there and may be read is for the one who needs it.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{key}={format_value(text)}: there is no home folder for '~'; write the path in full."
        ) from error
    try:
        os.stat(path)
    except ValueError as error:
        raise UserError(
            f"{key}={format_value(text)}: it has a character that no path can have; expected a path."
        ) from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{key}={format_value(text)} is longer than file names can be.") from error
    return path
