"""Rewrites the words of a command line as overrides that Hydra reads: plain words, flags, home folders, paths with
special characters, and for training what the words leave open."""

import os
import re
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from dino_lightning.config import TimmConfig
from dino_lightning.config.docs import path_keys
from dino_lightning.config.registry import option_names
from dino_lightning.data.sources.detect import detect_source
from dino_lightning.errors import UserError, did_you_mean
from dino_lightning.runtime.files import CONF

OUTPUT_KEYS = ("output_dir", "output")
"""Keys of paths that may not exist yet."""
MULTIRUN_FLAGS = ("-m", "--multirun")
"""Hydra's flags for a sweep, in which a comma separates values."""
INFO_FLAGS = ("-i", "--info")
"""Hydra's flags with an optional value."""
VALUE_FLAGS = ("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir")
"""Hydra's flags with a value."""
FLAGS = (
    *(*MULTIRUN_FLAGS, *INFO_FLAGS, *VALUE_FLAGS, "-r", "--run", "-sc", "--shell-completion"),
    *("--hydra-help", "--version", "--resolve"),
)

DATA_GROUPS = ("data", "experiment", "preset", "sweep")
"""Groups of which any on the command line means that the user has chosen data and settings."""
EXPERIMENT, CPU_EXPERIMENT = "small_data", "photos32"
"""Experiments for `dino train PATH`: a ViT with settings by number and size of the images; minutes on a CPU."""


def prepare_training(words: list[str], *, fast: bool | None = None) -> list[str]:
    """Hydra's overrides for `dino train WORDS`. It also makes the networks of timm among them options of `backbone`.

    `fast` says whether there is a GPU; None looks, if that matters.
    """
    overrides = quote_overrides(with_plain_words(words, "data.path", verb="train"))
    register_timm_networks(overrides)
    return with_photo_experiment(with_quick_start(overrides, fast=fast))


def quote_overrides(words: list[str]) -> list[str]:
    """The words as Hydra reads them; words that it reads already stay the same."""
    return with_flags_first(with_joined_shards(with_quoted_paths(with_home_folders(words))))


def with_plain_words(words: list[str], *keys: str, verb: str) -> list[str]:
    """The words with `key=` before each plain word, in the order of `keys`. Raises `UserError` for one too many."""
    free = [key for key in keys if not any(word.startswith(f"{key}=") for word in words)]
    overrides: list[str] = []
    before = ""
    for word in words:
        if before not in (*VALUE_FLAGS, *INFO_FLAGS) and _is_plain(word):
            if not free:
                expected = " and ".join(keys)
                raise UserError(
                    f"{word}: unexpected word; dino {verb} reads {expected}, and other settings as key=value."
                )
            overrides.append(f"{free.pop(0)}={word}")
        else:
            overrides.append(word)
        before = word
    return overrides


def _is_plain(word: str) -> bool:
    """Whether a word is a path or name and neither a flag, nor `key=value`, nor Hydra's `~key`."""
    if word.startswith("-") or re.fullmatch(r"~\w[\w./@]*", word):
        return False
    return "=" not in word or word.startswith(("/", "./", "../", "~/"))


def with_flags_first(words: list[str]) -> list[str]:
    """The words with Hydra's flags first: Hydra does not read overrides on both sides of a flag. Raises `UserError` for
    an unknown flag."""
    flags, overrides, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            overrides.append(word)
            continue
        if word.partition("=")[0] not in FLAGS:
            raise UserError(
                f"{word}: settings are written key=value, without dashes; of the flags, {did_you_mean(word, FLAGS)}"
            )
        flags.append(word)
        if word in INFO_FLAGS and not (rest and re.fullmatch(r"[a-z]+(-[a-z]+)*", rest[0])):
            flags.append("all")
        elif word in (*VALUE_FLAGS, *INFO_FLAGS) and rest:
            flags.append(rest.pop(0))
    return [*flags, *overrides]


def with_home_folders(overrides: list[str]) -> list[str]:
    """The overrides with the home folder in the place of `~`: Hydra reads no value that begins with it, and of
    `data.path=~/photos` a shell leaves it there, because a variable's name has no dot."""
    return [re.sub(r"(?<=[=,\[])~(?=[/,\]]|$)", os.path.expanduser("~"), word) for word in overrides]


def with_joined_shards(overrides: list[str]) -> list[str]:
    """The overrides with one `data.shards`, in quotes: Hydra takes braces for a dictionary, and a shell makes of a word
    with unquoted braces many words, of which Hydra would keep the last."""
    key = "data.shards="
    words = [text for text in overrides if text.startswith(key)]
    value = "::".join(word.removeprefix(key) for word in words)
    if value[:1] in ("", "'", '"') or (len(words) == 1 and "{" not in value):
        return overrides
    index = overrides.index(words[0])
    others = [text for text in overrides[index:] if text not in words]
    return [*overrides[:index], f'{key}"{value}"', *others]


def with_quoted_paths(words: list[str]) -> list[str]:
    """The words, with Hydra's quotes around those paths that it would not take, such as `/photos/Öland (2023)`.

    The shell has removed the user's quotes. Hydra needs quotes around most characters other than ASCII letters.
    """
    multirun = any(flag in words for flag in MULTIRUN_FLAGS)
    keys = {*path_keys(), "checkpoint", "init_from"}
    return [_quoted(word) if _needs_quotes(word, keys, multirun=multirun) else word for word in words]


def _needs_quotes(word: str, keys: set[str], *, multirun: bool) -> bool:
    key, _, value = word.partition("=")
    if key.lstrip("+") not in keys or not value or "${" in value or "\0" in value:
        return False
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return True
    return override.is_sweep_override() and not multirun and (key in OUTPUT_KEYS or Path(value).exists())


def _quoted(word: str) -> str:
    """`key='value'`; of backslashes only those before a quote, or at the end, have a meaning there."""
    key, _, value = word.partition("=")
    parts = value.split("'")
    trailing = [len(part) - len(part.rstrip("\\")) for part in parts]
    parts = [part + "\\" * count for part, count in zip(parts, trailing, strict=True)]
    return f"{key}='" + "\\'".join(parts) + "'"


def register_timm_networks(overrides: list[str]) -> None:
    """Make `backbone=NAME` work for every network of timm: an option for each name that is not a file."""
    # Several for a grid, and `choice(…)` of some for Optuna.
    names = [part for text in overrides if text.startswith("backbone=") for part in re.findall(r"[^,()]+", text[9:])]
    unknown = set(names) - set(option_names("backbone"))
    if not unknown:
        return
    import timm

    for name in filter(timm.is_model, sorted(unknown)):
        ConfigStore.instance().store(group="backbone", name=name, node=TimmConfig(name=name))


def with_quick_start(overrides: list[str], *, fast: bool | None = None) -> list[str]:
    """The overrides and, if they give `data.path` but neither data nor experiment, what reads the path, an experiment
    for this machine, and `auto.machine=true`.

    `fast` says whether there is a GPU; None looks. Raises `UserError` for what cannot be a path.
    """
    values = {word.partition("=")[0]: word.partition("=")[2] for word in overrides if "=" in word}
    if "data.path" not in values or any(group in values for group in DATA_GROUPS):
        return overrides
    path = values["data.path"]
    if path[:1] in "\"'":  # Hydra's quotes
        path = str(OverridesParser.create().parse_override(f"data.path={path}").value())
    # The crops of the CPU experiment are for its own network; those of the other fit any network.
    if fast is None:
        from dino_lightning.runtime.devices import trains_on_cpu  # torch takes seconds to import

        fast = "backbone" in values or not trains_on_cpu(values.get("trainer.accelerator", "auto"))
    added = [f"data={detect_source(path)}", f"experiment={EXPERIMENT if fast else CPU_EXPERIMENT}"]
    if "auto.machine" not in values:
        added.append("auto.machine=true")
    return _insert_before(f"data.path={values['data.path']}", added, overrides)


def with_photo_experiment(overrides: list[str]) -> list[str]:
    """The overrides and, where they name data but no experiment, the experiment for photographs.

    The default experiment, `quick`, is tuned to the drawings of the built-in set. A sweep over experiments names them.
    """
    groups = dict(text.split("=", 1) for text in overrides if "=" in text)
    if groups.get("data", "builtin") == "builtin" or "experiment" in groups or _names_experiments(groups.get("sweep")):
        return overrides
    return _insert_before(f"data={groups['data']}", ["experiment=photos32"], overrides)


def _insert_before(override: str, added: list[str], overrides: list[str]) -> list[str]:
    """The overrides with others next to their cause: Hydra refuses overrides that are separated by a flag."""
    index = overrides.index(override)
    return [*overrides[:index], *added, *overrides[index:]]


def _names_experiments(sweep: str | None) -> bool:
    if sweep in (None, "null"):
        return False
    path = CONF / "sweep" / f"{sweep}.yaml"
    return not path.exists() or "experiment:" in path.read_text()
