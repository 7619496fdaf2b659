"""Turns errors of Hydra and OmegaConf into one sentence that names the nearest valid choice."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from dino_lightning.cli.exit import one_line
from dino_lightning.config import SCHEMAS
from dino_lightning.config.docs import ROOTS, all_keys, keys_of, keys_of_root
from dino_lightning.config.registry import option_names
from dino_lightning.errors import UserError, did_you_mean

FILE_GROUPS = {"train": {"preset", "experiment", "sweep"}}
"""Verb -> its groups without a dataclass."""

PLUGINS = {
    "sweeper/optuna": ("hydra_optuna_sweeper", "optuna"),
    "launcher/joblib": ("hydra_joblib_launcher", "joblib"),
    "launcher/submitit_": ("hydra_submitit_launcher", "submitit"),
}
"""Start of an option of Hydra's -> what brings it, and the extra of which that is."""


def message_for(error: Exception, *, verb: str = "train") -> str:
    """One sentence for the user of `dino VERB`, in one line."""
    return one_line(str(error) if isinstance(error, UserError) else _message(error, verb))


def _message(error: Exception, verb: str) -> str:
    text, key = _whole_text(error), ""
    if match := re.search(r"full_key: ([\w.\[\]]+)", text):
        key = match[1]
    if match := re.search(r"(?:In .*?)?Could not find '(\w+)/([^']+)'", text):
        return _unknown_option(match[1], match[2])
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1], verb)
    if match := re.search(r"(\w+) is not a subclass of (\w+)", text):
        return _wrong_kind(match[1], match[2], key=key, verb=verb)
    if match := re.search(r"missing mandatory value: (\w+)|Missing mandatory value: ([\w.]+)", text):
        key = key or match[1] or match[2]
        return f"{key} has no value: give it on the command line, {key}=…; {_doc(key, verb)}"
    if isinstance(error, OverflowError):
        return f"{key}: the value is too large for a number; {_doc(key, verb)}"
    if key:
        return f"{key}: {_first_line(text, 'Value')}; {_doc(key, verb)}"
    return " ".join(text.split("See https://")[0].split())


def _whole_text(error: BaseException) -> str:
    """The error's words and those of what caused it, which tell more."""
    parts = []
    current: BaseException | None = error
    while current is not None:
        parts.append(str(current))
        current = current.__cause__ or current.__context__
    return "\n".join(parts)


def _unknown_option(group: str, option: str) -> str:
    if group == "hydra":
        return _unknown_plugin(option)
    known = option_names(group)
    sentence = f"{group}={option} is not an option of {group}; {did_you_mean(option, known)}"
    if group == "backbone":
        sentence += "" if sentence.endswith("?") else "."
        sentence += " Every network of timm works by its name, too (`timm.list_models()`)."
    return sentence


def _unknown_plugin(option: str) -> str:
    """An option of `hydra/sweeper` or `hydra/launcher`, which the files name but a package of an extra brings."""
    kind, _, name = option.rpartition("/")
    brings, extra = next((both for start, both in PLUGINS.items() if option.startswith(start)), ("", ""))
    if brings and find_spec(f"hydra_plugins.{brings}") is None:
        return f'hydra/{option} is not installed: pip install "dino-lightning[{extra}]"'
    stored = [file.removesuffix(".yaml") for file in ConfigStore.instance().list(f"hydra/{kind}") if "." in file]
    known = sorted({*option_names(f"hydra/{kind}"), *stored})
    return f"hydra/{kind}={name} is not an option of hydra/{kind}; {did_you_mean(name, known)}"


def _wrong_kind(chosen: str, wanted: str, *, key: str, verb: str) -> str:
    """An option of a group that training and evaluation share, chosen in the wrong one of the two."""
    for group, schemas in SCHEMAS.items():
        option = next((name for name, schema in schemas.items() if schema.__name__ == chosen), None)
        if option:
            roots = {parent.__name__: parent for schema in schemas.values() for parent in schema.__mro__}
            known = [name for name, schema in schemas.items() if issubclass(schema, roots[wanted])]
            return f"{group}={option} does not belong to this program; choose {group}={' or '.join(known)}."
    value = "null" if chosen == "NoneType" else f"of type {chosen}"
    return f"{key}: a value is {value} where a {wanted} is expected; {_doc(key, verb)}"


def _unknown_key(key: str, verb: str) -> str:
    own = keys_of_root(ROOTS[verb])
    owners = [found.schema for found in all_keys() if found.name == key]
    group = key.split(".")[0]
    if key in SCHEMAS:
        return f"{key}=… is not for dino {verb}; --help lists its groups."
    if owners and group in own:
        options = [name for name, schema in SCHEMAS[group].items() if any(issubclass(schema, o) for o in owners)]
        return f"{key} belongs to {group}={' or '.join(options)}, which is not the one chosen."
    if owners:
        verbs = [f"dino {other}" for other, root in ROOTS.items() if key in keys_of_root(root)]
        return f"{key} is a key of {' and '.join(verbs)} only."
    known = {name for name in own if name.startswith(f"{group}.")}
    if not known:
        known = own if "." in key else {name for name in own if "." not in name or name.split(".")[0] not in SCHEMAS}
    return f"{key} is not a key of the configuration; {did_you_mean(key, known | FILE_GROUPS.get(verb, set()))}"


def _first_line(text: str, start: str) -> str:
    line = next((line for line in text.splitlines() if line.startswith(start)), text.splitlines()[-1])
    return line[0].lower() + line[1:]


def _doc(key: str, verb: str) -> str:
    name = re.sub(r"\[\d+\]", "", key)
    found = [known for known in (*keys_of(ROOTS[verb]), *all_keys()) if known.name == name]
    return f"it is: {found[0].doc if found else 'see its group'}"


EXPLAINED = (UserError, HydraException, OmegaConfBaseException)
"""Errors that a user can cause; all others keep their traceback."""


def explained(error: Exception, *, verb: str = "train") -> UserError:
    """The error as a `UserError` with one sentence for the user of `dino VERB`."""
    return error if isinstance(error, UserError) else UserError(message_for(error, verb=verb))


@contextmanager
def as_user_errors(*, verb: str = "train") -> Iterator[None]:
    """Raise errors of Hydra and OmegaConf as `UserError` with a sentence for the user of `dino VERB`."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise explained(error, verb=verb) from error
    except OverflowError as error:
        if "full_key" not in str(error):  # OmegaConf has no error class for a number with hundreds of digits
            raise
        raise explained(error, verb=verb) from error
