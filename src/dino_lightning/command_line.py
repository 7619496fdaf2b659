"""Paths on a command line that Hydra's grammar has no place for: `data.path=/photos/Öland (2023)`.

A shell has taken the user's quotes off before Hydra sees the word, and Hydra wants quotes of its own around most
characters that are not ASCII letters.
"""

from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from dino_lightning.config.paths import PATHS

KEYS = (*PATHS, "checkpoint", "init_from")
"""Keys whose value may be a path."""
WRITTEN = ("output_dir", "output")
"""Those that need not be there yet."""
SEVERAL = ("-m", "--multirun")
"""Hydra's flags for a sweep, where a comma separates values."""


def with_quoted_paths(words: list[str]) -> list[str]:
    """The words, with Hydra's quotes around those paths that it would not take."""
    several = any(flag in words for flag in SEVERAL)
    return [_quoted(word) if _needs_quotes(word, several=several) else word for word in words]


def _needs_quotes(word: str, *, several: bool) -> bool:
    key, _, value = word.partition("=")
    if key.lstrip("+") not in KEYS or not value or "${" in value or "\0" in value:
        return False
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return True
    return override.is_sweep_override() and not several and (key in WRITTEN or Path(value).exists())


def _quoted(word: str) -> str:
    """`key='value'`; of backslashes only those before a quote, or at the end, have a meaning there."""
    key, _, value = word.partition("=")
    parts = value.split("'")
    trailing = [len(part) - len(part.rstrip("\\")) for part in parts]
    parts = [part + "\\" * count for part, count in zip(parts, trailing, strict=True)]
    return f"{key}='" + "\\'".join(parts) + "'"
