"""Errors that a user can cause: one sentence with the key, its value, what was expected and a solution."""

import difflib
from collections.abc import Iterable

WEAK_MATCH, TYPO = 0.6, 0.71
"""Similarity from 0 to 1 from which a choice is suggested, and from which the other choices are not listed."""


class UserError(ValueError):
    """A wrong setting, file or combination. The command line prints its sentence and exits with status 2."""


class RanksDifferError(UserError):
    """A wrong setting that all processes of a run have detected, so that only one of them has to print it."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A clause that names the closest of `choices`, and lists them unless it is very close."""
    known = [str(choice) for choice in choices]
    listed = f"one of {', '.join(sorted(known)[:20])}{', …' if len(known) > 20 else ''}"
    matches = difflib.get_close_matches(str(name), known, n=1, cutoff=WEAK_MATCH)
    if not matches:
        return f"choose {listed}"
    is_typo = difflib.get_close_matches(str(name), matches, cutoff=TYPO)
    return f"did you mean '{matches[0]}'?" + ("" if is_typo else f" Choose {listed}")


def cannot_be_written(key: str, path: object, error: OSError) -> UserError:
    """The error for a folder, the value `path` of `key`, that cannot be created or written because of `error`."""
    reason = error.strerror or str(error)
    if isinstance(error, FileExistsError | NotADirectoryError):
        reason = f"'{error.filename or path}' is a file or inside a file"
    return UserError(f"{key}={path} cannot be written ({reason}); choose a folder that you can write to.")
