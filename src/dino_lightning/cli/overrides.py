"""Words of a command line as Hydra takes them: home folders, paths of any name, braces, flags between overrides."""

import os
import re
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from dino_lightning.cli.quick_start import with_quick_start
from dino_lightning.config import TimmConfig
from dino_lightning.config.conf_dir import CONF, option_names
from dino_lightning.config.paths import PATHS

KEYS = (*PATHS, "checkpoint", "init_from")
"""Keys whose value may be a path."""
WRITTEN = ("output_dir", "output")
"""Those that need not be there yet."""
SEVERAL = ("-m", "--multirun")
"""Hydra's flags for a sweep, where a comma separates values."""
WITH_A_VALUE = (
    "-c",
    "--cfg",
    "-p",
    "--package",
    "-cp",
    "--config-path",
    "-cn",
    "--config-name",
    "-cd",
    "--config-dir",
    "--experimental-rerun",
)
"""Flags of Hydra's that the word behind belongs to."""
INFO = ("-i", "--info")
"""Those that do without one, and take an override for it."""


def quote_overrides(words: list[str]) -> list[str]:
    """The words as Hydra takes them; what it takes already stays."""
    return with_flags_first(with_shards_in_one_piece(with_quoted_paths(with_home_folders(words))))


def with_flags_first(words: list[str]) -> list[str]:
    """The words with Hydra's flags before the overrides: it does not take overrides on both sides of a flag."""
    flags, overrides, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            overrides.append(word)
            continue
        flags.append(word)
        if word in INFO and not (rest and re.fullmatch(r"[a-z]+(-[a-z]+)*", rest[0])):
            flags.append("all")
        elif word in (*WITH_A_VALUE, *INFO) and rest:
            flags.append(rest.pop(0))
    return [*flags, *overrides]


def with_home_folders(overrides: list[str]) -> list[str]:
    """The overrides with the home folder in the place of `~`: Hydra reads no value that begins with it, and of
    `data.path=~/photos` a shell leaves it there, because a variable's name has no dot."""
    return [re.sub(r"(?<=[=,\[])~(?=[/,\]]|$)", os.path.expanduser("~"), word) for word in overrides]


def with_shards_in_one_piece(overrides: list[str]) -> list[str]:
    """The overrides with one `data.shards`, in quotes: Hydra takes braces for a dictionary, and a shell makes of a word
    with unquoted braces many words, of which Hydra would keep the last."""
    key = "data.shards="
    words = [text for text in overrides if text.startswith(key)]
    value = "::".join(word.removeprefix(key) for word in words)
    if value[:1] in ("", "'", '"') or (len(words) == 1 and "{" not in value):
        return overrides
    place = overrides.index(words[0])
    others = [text for text in overrides[place:] if text not in words]
    return [*overrides[:place], f'{key}"{value}"', *others]


def with_quoted_paths(words: list[str]) -> list[str]:
    """The words, with Hydra's quotes around those paths that it would not take, such as `/photos/Öland (2023)`.

    A shell has taken the user's quotes off. Hydra wants some of its own around most characters beyond ASCII letters.
    """
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


def prepare_overrides(words: list[str], *, fast: bool | None = None) -> list[str]:
    """The words of a command line with what they leave unsaid, and in Hydra's grammar; networks of timm among them
    become options. `fast` says whether there is a GPU; None looks where that matters."""
    register_timm_networks(words)
    return with_settings_for_data(with_quick_start(quote_overrides(words), fast=fast))


def register_timm_networks(overrides: list[str]) -> None:
    """Make `backbone=NAME` work for every network of timm: an option for each name that is not a file."""
    # Several for a grid, and `choice(…)` of some for Optuna.
    names = [part for text in overrides if text.startswith("backbone=") for part in re.findall(r"[^,()]+", text[9:])]
    unknown = set(names) - set(option_names(CONF / "backbone"))
    if not unknown:
        return
    import timm

    for name in filter(timm.is_model, sorted(unknown)):
        ConfigStore.instance().store(group="backbone", name=name, node=TimmConfig(name=name))


def with_settings_for_data(overrides: list[str]) -> list[str]:
    """The overrides and, where they name data but no experiment, the experiment for photographs.

    The default experiment, `quick`, is tuned to the drawings of the built-in set. A sweep over experiments names them.
    """
    groups = dict(text.split("=", 1) for text in overrides if "=" in text)
    if groups.get("data", "builtin") == "builtin" or "experiment" in groups or _names_experiments(groups.get("sweep")):
        return overrides
    # Beside its cause: Hydra refuses overrides that do not stand together, such as one behind `--multirun`.
    place = overrides.index(f"data={groups['data']}")
    return [*overrides[:place], "experiment=photos32", *overrides[place:]]


def _names_experiments(sweep: str | None) -> bool:
    if sweep in (None, "null"):
        return False
    path = CONF / "sweep" / f"{sweep}.yaml"
    return not path.exists() or "experiment:" in path.read_text()
