"""Paths that cannot exist are refused before anything looks for them."""

import errno
import os
from pathlib import Path

from dino_lightning.config.dotted import format_value
from dino_lightning.errors import UserError


def usable_path(key: str, text: str) -> Path:
    """The path with `~` expanded. Raises `UserError` if no file on any disk can have it.

    The caller checks whether it exists and can be read.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}={format_value(text)}: '~' has no home folder; write the full path.") from error
    try:
        os.stat(path)
    except ValueError as error:
        raise UserError(f"{key}={format_value(text)} contains a character that no path can have.") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{key}={format_value(text)} is longer than file names can be.") from error
    return path
