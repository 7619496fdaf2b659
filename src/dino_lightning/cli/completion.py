"""Tab completion: `eval "$(dino train -sc install=bash)"`, or `zsh`, `fish`. It serves all verbs.

The shell runs `dino -sc query=bash` with the line typed so far in `COMP_LINE`. Verbs are completed here, the rest by
Hydra. Hydra composes the line to know the keys, so the line is prepared in the same way as the command itself.
"""

import os
from collections.abc import Callable, Iterable

from dino_lightning.errors import UserError

COMPLETION_FLAGS = ("-sc", "--shell-completion")
"""Hydra's flags."""


def asks_for_completion(words: list[str]) -> bool:
    """Whether a shell asks for completions."""
    return any(flag in words for flag in COMPLETION_FLAGS) and "COMP_LINE" in os.environ


def complete_verb(verbs: Iterable[str]) -> str | None:
    """Take the verb out of the line and return it. While it is being typed, print the verbs that fit; return None."""
    program, *words = _line().split(" ")
    if len(words) <= 1:
        print(" ".join(verb for verb in verbs if verb.startswith("".join(words))))
        return None
    _set_line(" ".join([program, *words[1:]]))
    return words[0] if words[0] in verbs else None


def complete_after(prepare: Callable[[list[str]], list[str]]) -> None:
    """Let Hydra complete the line after `prepare`, which is applied to all words but the one at the cursor."""
    before, _, last = _line().rpartition(" ")
    program, *words = before.split() or [""]
    try:
        _set_line(" ".join([program, *prepare(words), last]))
    except UserError:
        return  # the line is not complete yet


def _line() -> str:
    """The line up to the cursor."""
    line = os.environ.get("COMP_LINE", "")
    return line[: int(os.environ.get("COMP_POINT", len(line)))]


def _set_line(line: str) -> None:
    os.environ["COMP_LINE"], os.environ["COMP_POINT"] = line, str(len(line))
