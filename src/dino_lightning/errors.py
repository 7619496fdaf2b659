"""Errors that a user can cause: one sentence with the key, its value, what was expected and a solution."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A wrong setting, file or combination. The command line prints its sentence and exits with status 2."""


class RanksDifferError(UserError):
    """A wrong setting that all processes of a run have detected, so that only one of them has to print it."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A clause that names the closest of `choices`, and lists them unless it is very close."""
    known = [str(choice) for choice in choices]
    (close, *_) = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6) or [""]
    if close and difflib.SequenceMatcher(None, close, str(name)).ratio() > 0.68:
        return f"did you mean '{close}'?"
    listed = f"hoose one of {', '.join(sorted(known)[:20])}{', …' if len(known) > 20 else ''}"
    return f"did you mean '{close}'? C{listed}" if close else f"c{listed}"


def cannot_be_written(key: str, path: object, error: OSError) -> UserError:
    """The error for a folder, the value `path` of `key`, that cannot be created or written because of `error`."""
    reason = error.strerror or str(error)
    if isinstance(error, FileExistsError | NotADirectoryError):
        reason = f"'{error.filename or path}' is a file or inside a file"
    return UserError(f"{key}={path} cannot be written ({reason}); choose a folder that you can write to.")
