"""Errors of Hydra and OmegaConf as one sentence with the nearest valid choice."""

import os
import re
import sys
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from dino_lightning.config import SCHEMAS
from dino_lightning.config.conf_dir import CONF, option_names
from dino_lightning.config.docs import all_keys
from dino_lightning.errors import RanksDifferError, UserError, cannot_be_written, did_you_mean

PROGRAMS = {
    "TrainConfig": "training (train.py)",
    "EvaluateConfig": "evaluation (dino eval)",
    "EmbedConfig": "embedding (dino embed)",
    "ExportConfig": "export (dino export)",
}

PLUGINS = {
    "sweeper/optuna": ("hydra_optuna_sweeper", "optuna"),
    "launcher/joblib": ("hydra_joblib_launcher", "joblib"),
    "launcher/submitit_": ("hydra_submitit_launcher", "submitit"),
}
"""Start of an option of Hydra's -> what brings it, and the extra of which that is."""


def message_for(error: Exception, *, conf: Path) -> str:
    """One sentence for a person, in one line whatever a value or a library's words have in them."""
    return re.sub(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+\s*", " ", _explained(error, conf=conf)).strip()


def _explained(error: Exception, *, conf: Path) -> str:
    if isinstance(error, UserError):
        return str(error)
    text = _whole_text(error)
    if match := re.search(r"(?:In .*?)?Could not find '(\w+)/([^']+)'", text):
        return _unknown_option(match[1], match[2], conf)
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1])
    if match := re.search(r"(\w+) is not a subclass of (\w+)", text):
        return _wrong_kind(match[1], match[2], key=_full_key(text))
    if match := re.search(r"missing mandatory value: (\w+)|Missing mandatory value: ([\w.]+)", text):
        key = _full_key(text) or match[1] or match[2]
        return f"{key} has no value: give it on the command line, {key}=…; {_doc(key)}"
    if isinstance(error, OverflowError):
        return f"{_full_key(text)}: the value is too large for a number; {_doc(_full_key(text))}"
    if "full_key" in text:
        return f"{_full_key(text)}: {_first_line(text, 'Value')}; {_doc(_full_key(text))}"
    return " ".join(text.split("See https://")[0].split())


def _whole_text(error: BaseException) -> str:
    """The error's words and those of what caused it, which tell more."""
    parts = []
    current: BaseException | None = error
    while current is not None:
        parts.append(str(current))
        current = current.__cause__ or current.__context__
    return "\n".join(parts)


def _unknown_option(group: str, option: str, conf: Path) -> str:
    if group == "hydra":
        return _unknown_plugin(option, conf)
    known = option_names(conf / group)
    sentence = f"{group}={option} is not an option of {group}; {did_you_mean(option, known)}"
    if group == "backbone":
        sentence += " Every network of timm works by its name, too (`timm.list_models()`)."
    return sentence


def _unknown_plugin(option: str, conf: Path) -> str:
    """An option of `hydra/sweeper` or `hydra/launcher`, which the files name but a package of an extra brings."""
    kind, _, name = option.rpartition("/")
    brings, extra = next((both for start, both in PLUGINS.items() if option.startswith(start)), ("", ""))
    if brings and find_spec(f"hydra_plugins.{brings}") is None:
        return f'hydra/{option} is not installed: pip install "dino-lightning[{extra}]"'
    stored = [file.removesuffix(".yaml") for file in ConfigStore.instance().list(f"hydra/{kind}") if "." in file]
    known = sorted({*option_names(conf / "hydra" / kind), *stored})
    return f"hydra/{kind}={name} is not an option of hydra/{kind}; {did_you_mean(name, known)}"


def _wrong_kind(chosen: str, wanted: str, *, key: str) -> str:
    """An option of a group that training and evaluation share, chosen in the wrong one of the two."""
    for group, schemas in SCHEMAS.items():
        option = next((name for name, schema in schemas.items() if schema.__name__ == chosen), None)
        if option:
            roots = {parent.__name__: parent for schema in schemas.values() for parent in schema.__mro__}
            known = [name for name, schema in schemas.items() if issubclass(schema, roots[wanted])]
            return f"{group}={option} does not belong to this program; choose {group}={' or '.join(known)}."
    value = "null" if chosen == "NoneType" else f"of type {chosen}"
    return f"{key}: a value is {value} where a {wanted} is expected; {_doc(key)}"


def _unknown_key(key: str) -> str:
    keys = all_keys()
    known = {found.name for found in keys} | set(SCHEMAS)
    if key in SCHEMAS:
        return f"{key}=… is not for this program; its groups stand in --help."
    if key in known:
        owners = [found.schema for found in keys if found.name == key]
        group = key.split(".")[0]
        if group not in SCHEMAS:
            return f"{key} is a key of {' and '.join(PROGRAMS[owner.__name__] for owner in owners)} only."
        options = [name for name, schema in SCHEMAS[group].items() if any(issubclass(schema, o) for o in owners)]
        return f"{key} belongs to {group}={' or '.join(options)}, which is not the one chosen."
    group = key.split(".")[0]
    roots = {*(name for name in known if "." not in name), "auto.data", "auto.machine", "preset", "sweep"}
    own = {name for name in known if name.startswith(f"{group}.")} or (known if "." in key else roots)
    return f"{key} is not a key of the configuration; {did_you_mean(key, own)}"


def _full_key(text: str) -> str:
    match = re.search(r"full_key: ([\w.\[\]]+)", text)
    return match[1] if match else ""


def _first_line(text: str, start: str) -> str:
    line = next((line for line in text.splitlines() if line.startswith(start)), text.splitlines()[-1])
    return line[0].lower() + line[1:]


def _doc(key: str) -> str:
    doc = next((found.doc for found in all_keys() if found.name == re.sub(r"\[\d+\]", "", key)), "see its group")
    return f"it is: {doc}"


PRINTING = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i"}
"""Flags of Hydra's that print and do nothing else."""


ALONE_S = 2.0
"""Seconds after which an error counts as that of this process alone."""


EXPLAINED = (UserError, HydraException, OmegaConfBaseException)
"""Errors that a user causes; all others keep their traceback."""


def sentence(error: Exception) -> str | None:
    """What a failed run has to say, or None for an error that nobody foresaw."""
    return message_for(error, conf=CONF) if isinstance(error, (*EXPLAINED, FloatingPointError)) else None


def exit_with_error(error: Exception, *, program: str = "dino-lightning") -> NoReturn:
    """Say what is wrong, once over all processes that have the same error, and leave with status 2."""
    words, number = message_for(error, conf=CONF), int(os.environ.get("LOCAL_RANK", "0"))
    if number == 0:
        print(f"{program}: {words}", file=sys.stderr)
    elif not isinstance(error, RanksDifferError):
        # An error that the first process of the machine has, too, makes the launcher end this one meanwhile.
        time.sleep(ALONE_S)
        print(f"{program}: on rank {os.environ.get('RANK', number)}: {words}", file=sys.stderr)
    sys.exit(2)


def exit_after_lost_rank(error: RuntimeError) -> NoReturn:
    """Say that another rank is lost, in place of the traceback of whatever waited for it, and leave with status 1."""
    cause = " ".join(str(error).split())
    print(
        f"dino-lightning: rank {os.environ.get('RANK', os.environ.get('LOCAL_RANK', '0'))} ends because another rank "
        "has ended or has not answered within collective_timeout_s; if one has failed, its own message says why "
        f"({cause[:300]})",
        file=sys.stderr,
    )
    sys.exit(1)


def refuse_folder(error: OSError, *, program: str = "dino-lightning") -> NoReturn:
    """Say that Hydra could not make the folder of the run, which it does before all else; raise other errors again."""
    if isinstance(error, BrokenPipeError) and PRINTING & set(sys.argv):  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes on its way out
        sys.exit(0)
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [file for file in files if Path(file).name not in ("pathlib.py", "_local.py", "os.py")]
    if error.filename is None or Path(hydra.__file__).parent not in Path(ours[-1]).parents:
        raise error
    exit_with_error(cannot_be_written("output_dir", error.filename, error), program=program)


def refuse_number(error: OverflowError, *, program: str = "dino-lightning") -> NoReturn:
    """Say that the number of a key has hundreds of digits, for which OmegaConf has no error; raise others again."""
    if "full_key" not in str(error):
        raise error
    exit_with_error(error, program=program)
