"""The help of `dino` and of its verbs. Imports the standard library alone, because it must answer at once.

The text of `dino VERB --help` is the docstring of `cli/VERB.py`. Options of groups are the files under `conf/` and the
names in `config.SCHEMAS`; keys with their documentation are read from the source of the dataclass.
"""

import ast
import re
import textwrap
from itertools import pairwise
from typing import Any

from dino_lightning.runtime.files import CONF, PACKAGE, yaml_names

WIDTH = 110
"""Columns of the help."""

VERBS = ("train", "eval", "embed", "export", "data", "table", "report", "wandb", "replay", "docs")
"""The module `dino_lightning.cli.VERB` has the function `main` of each."""
GROUPS = {
    "train": [
        "backbone",
        "method",
        "crops",
        "data",
        "optim",
        "trainer",
        "compute",
        "logger",
        "callbacks",
        "preset",
        "experiment",
        "sweep",
    ],
    "eval": ["eval", "data", "trainer", "logger"],
    "embed": ["data", "trainer"],
}
"""Verb whose configuration Hydra composes -> groups of its configuration."""
BENCHMARKS = {"copydays", "davis", "pictures", "revisited", "voc"}
HIDDEN = {
    "train": {"data": BENCHMARKS, "trainer": {"devices"}},
    "eval": {"trainer": {"default"}},
    "embed": {"data": BENCHMARKS, "trainer": {"default"}},
}
"""Verb -> group -> options of the group that are for other verbs."""
KEYS = {"embed": ("config/commands.py", "EmbedConfig"), "export": ("config/commands.py", "ExportConfig")}
"""Verb -> file and name of the dataclass with its keys, if that is not `Options` in `cli/VERB.py`."""


def overview() -> str:
    """The help of `dino`."""
    width = max(map(len, VERBS))
    summaries = {verb: _text(verb).partition(".\n")[0] for verb in VERBS}
    verbs = "\n".join(f"  {verb:<{width}}  {text[0].lower()}{text[1:]}" for verb, text in summaries.items())
    return f"""DINO, self-distillation with no labels, on PyTorch Lightning.

usage: dino VERB [key=value ...]

{verbs}

Examples:
  dino train ~/photos                   train on your images
  dino eval outputs/RUN                 evaluate the network
  dino embed outputs/RUN ~/photos output=photos.parquet

dino VERB --help says more."""


def verb_help(verb: str) -> str:
    """The help of `dino VERB`."""
    intro, examples = _text(verb).strip().split("\n\nExamples:")
    parts, options = [intro], group_options(verb)
    if options:
        parts.append("Groups (group=option):\n" + "\n".join(_entry(key, _listed(options[key])) for key in options))
    if verb not in ("train", "eval"):
        entries = [_entry(key, text) for key, text in documented_keys(verb).items() if key not in options]
        parts.append("Keys (key=value):\n" + "\n".join(entries))
    parts.append(f"Examples:{examples}")
    if options:
        flags = "Flags: --cfg job prints all settings"
        flags += "." if verb == "embed" else "; -m, --multirun starts a run for each value of key=A,B."
        parts.append(f"{flags}\nAll keys with defaults and units: docs/configuration.md")
    return "\n\n".join(parts)


def group_options(verb: str) -> dict[str, list[str]]:
    """Group -> its options for this verb; those in a folder of the group as FOLDER/NAME, at the end."""
    known, hidden = _schema_names(), HIDDEN.get(verb, {})
    return {
        group: yaml_names(CONF / group, also=known.get(group, set()) - hidden.get(group, set()))
        for group in GROUPS.get(verb, ())
    }


def _schema_names() -> dict[str, set[str]]:
    """Group -> names of its dataclasses in `config.SCHEMAS`."""
    nodes = [node for node in ast.parse(_source("config/__init__.py")).body if isinstance(node, ast.AnnAssign)]
    schemas: Any = next(node.value for node in nodes if ast.unparse(node.target) == "SCHEMAS")
    groups = zip(map(ast.literal_eval, schemas.keys), schemas.values, strict=True)
    return {group: set(map(ast.literal_eval, options.keys)) for group, options in groups}


def documented_keys(verb: str) -> dict[str, str]:
    """Key -> documentation and default of each field of the dataclass of a verb, from the source."""
    file, schema = KEYS.get(verb, (f"cli/{verb}.py", "Options"))
    classes = {node.name: node for node in ast.parse(_source(file)).body if isinstance(node, ast.ClassDef)}
    return _documented_fields(schema, classes)


def _documented_fields(schema: str, classes: dict[str, ast.ClassDef]) -> dict[str, str]:
    keys: dict[str, str] = {}
    for base in map(ast.unparse, classes[schema].bases):
        keys |= _documented_fields(base, classes)
    for node, below in pairwise(classes[schema].body):
        match node, below:
            case ast.AnnAssign(target=ast.Name(id=name), value=value), ast.Expr(value=ast.Constant(value=str(doc))):
                keys[name] = f"{' '.join(doc.split())}{_default(value)}"
    return keys


def _default(value: ast.expr | None) -> str:
    if not isinstance(value, ast.Constant) or value.value in (None, ""):
        return ""
    text = str(value.value)
    return f" Default: {text.lower() if isinstance(value.value, bool) else text}."


def _source(file: str) -> str:
    return (PACKAGE / file).read_text("utf-8")


def _text(verb: str) -> str:
    """The docstring of `cli/VERB.py`."""
    return ast.get_docstring(ast.parse(_source(f"cli/{verb}.py")), clean=False) or ""


def _listed(options: list[str]) -> str:
    """Options in a line; those in a folder as FOLDER/…"""
    return ", ".join(dict.fromkeys(re.sub(r"/.*", "/…", option) for option in options))


def _entry(name: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=f"  {name:<22} ", subsequent_indent=" " * 25)
