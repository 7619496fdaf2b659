"""Tab completion: `eval "$(dino train -sc install=bash)"`, or `zsh`, `fish`.

Hydra answers the shell, which sends the line typed so far in `COMP_LINE`. It composes that line to know the keys, so
the line has to be made what the command itself would make of it.
"""

import os
from collections.abc import Callable

from dino_lightning.errors import UserError

FLAGS = ("-sc", "--shell-completion")
"""Hydra's."""


def asks_for_completion(words: list[str]) -> bool:
    """Whether a shell asks, and not a user."""
    return any(flag in words for flag in FLAGS) and "COMP_LINE" in os.environ


def complete_after(prepare: Callable[[list[str]], list[str]]) -> None:
    """Let Hydra complete what `prepare` makes of the words before the cursor; the last one stays as it was typed."""
    line = os.environ["COMP_LINE"][: int(os.environ.get("COMP_POINT", len(os.environ["COMP_LINE"])))]
    before, _, last = line.rpartition(" ")
    words = before.split()
    program = 2 if words and words[0].startswith("python") else 1
    try:
        prepared = [*words[:program], *prepare(words[program:]), last]
    except UserError:
        return  # of a line that is not whole yet
    os.environ["COMP_LINE"] = " ".join(prepared)
    os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))
