"""Ends the process with one sentence. Imports no library."""

import re
import sys
import time
from typing import NoReturn

from dino_lightning.errors import RanksDifferError
from dino_lightning.runtime.ranks import is_first_on_machine, rank_name

OTHER_RANKS_S = 2.0
"""Seconds that a further rank waits before it prints its error. If the first rank of the machine has the same error,
the launcher ends this one in that time."""


def one_line(text: str) -> str:
    """The text in one line, whatever a value or the message of a library contains."""
    return re.sub(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+\s*", " ", text).strip()


def exit_with_error(error: Exception, *, program: str) -> NoReturn:
    """Print the error and exit with status 2."""
    print_error(error, program=program)
    sys.exit(2)


def print_error(error: Exception, *, program: str) -> None:
    """Print the error, once for all processes that have it."""
    text = one_line(str(error))
    if is_first_on_machine():
        print(f"{program}: {text}", file=sys.stderr)
    elif not isinstance(error, RanksDifferError):
        time.sleep(OTHER_RANKS_S)
        print(f"{program}: on rank {rank_name()}: {text}", file=sys.stderr)


def exit_after_lost_rank(error: RuntimeError, *, program: str) -> NoReturn:
    """Print that another rank was lost, instead of the traceback of the call that waited for it, and exit with 1."""
    print(
        f"{program}: rank {rank_name()} ends because another rank has "
        "ended or has not answered within collective_timeout_s; if one has failed, its own message says why "
        f"({' '.join(str(error).split())[:300]})",
        file=sys.stderr,
    )
    sys.exit(1)
