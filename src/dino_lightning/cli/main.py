"""The command `dino VERB ...`: prints help or starts a verb.

Until a verb starts, only the standard library is imported, so that help and wrong verbs answer at once.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from dino_lightning.cli.completion import COMPLETION_FLAGS, complete_verb
from dino_lightning.cli.exit import print_error
from dino_lightning.cli.help import GROUPS, VERBS, overview, verb_help
from dino_lightning.errors import UserError, did_you_mean

HELP_FLAGS = ("-h", "--help")
PRINTING_FLAGS = (*HELP_FLAGS, "--hydra-help", "--cfg", "-c", "--info", "-i")
"""Flags that print something and do nothing else."""


def main(words: Sequence[str] | None = None) -> int:
    """Run `dino WORDS`, by default those of the command line; returns the exit status."""
    words = list(sys.argv[1:] if words is None else words)
    try:
        status = start(words)
        sys.stdout.flush()
    except BrokenPipeError:
        if words[:1] and words[0] in GROUPS and not set(PRINTING_FLAGS) & set(words):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `dino --help | head`: Python flushes at exit
        return 0
    return status


def start(words: list[str]) -> int:
    """Print help, answer a shell that completes a line, or start a verb."""
    if words[:1] and words[0] in COMPLETION_FLAGS:
        verb = complete_verb(sorted(VERBS))
        if verb not in GROUPS:
            return 0
        words = [verb, *words]
    if not words or words[0] in HELP_FLAGS:
        print(overview())
        return 0
    verb, *rest = words
    if verb not in VERBS:
        print_error(UserError(f"{verb} is not a command; {did_you_mean(verb, VERBS)}"), program="dino")
        return 2
    if set(HELP_FLAGS) & set(rest):
        print(verb_help(verb))
        return 0
    if verb == "train":
        from dino_lightning.runtime.signals import install_early_handlers

        install_early_handlers()
    try:
        return import_module(f"dino_lightning.cli.{verb}").main(rest) or 0
    except UserError as error:
        print_error(error, program=f"dino {verb}")
        return 2
