"""Write docs/configuration.md, the page of all keys (in a checkout).

usage: dino docs [check=true]

Examples:
  dino docs
  dino docs check=true                             exit with 1 if the page is out of date
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from dino_lightning.cli.options import parse_options
from dino_lightning.config import SCHEMAS
from dino_lightning.config.docs import ROOTS, Key, all_keys, keys_of
from dino_lightning.errors import UserError

TARGET = Path(__file__).parents[3] / "docs" / "configuration.md"

HEADER = """# Configuration

Made by `dino docs` from the dataclasses in `src/dino_lightning/config/`; do not edit. A group is chosen as
`group=option`, a key set as `group.key=value`. The options of each group are the files under `conf/GROUP/`.

A *duration* is a string with a unit: `10ep` (epochs), `500it` (optimizer steps) or `10%` (of the run).
"""


@dataclass
class Options:
    """Keys of `dino docs`."""

    check: bool = False
    """Write nothing; exit with status 1 if the page is out of date."""


def main(words: list[str]) -> int:
    """Write or check the page; returns the exit status."""
    options = parse_options(Options, words, program="dino docs")
    if not TARGET.parent.is_dir():
        raise UserError("dino docs writes docs/configuration.md of a checkout, and this is an installed package")
    page = render()
    if not options.check:
        TARGET.write_text(page)
    elif not TARGET.exists() or TARGET.read_text() != page:
        print("docs/configuration.md is out of date: run dino docs", file=sys.stderr)
        return 1
    return 0


def render() -> str:
    """The page as Markdown."""
    titles = ("A training run", "An evaluation", "Features of images", "Weights in another format")
    tables = [_table(title, root, list(keys_of(root))) for title, root in zip(titles, ROOTS.values(), strict=True)]
    keys = all_keys()
    for group, schemas in SCHEMAS.items():
        own = [key for key in keys if key.name.startswith(f"{group}.")]
        for owner in dict.fromkeys(key.schema for key in own):
            names = [name for name, schema in schemas.items() if issubclass(schema, owner)]
            nested = [key for key in own if key.schema is owner]
            title = f"{group} ({', '.join(names)})" if names and len(schemas) > 1 else group
            if not names:  # a part of a group, such as callbacks.knn
                title = nested[0].name.rpartition(".")[0]
            tables.append(_table(title, owner, nested))
    return "\n".join([HEADER, *tables])


def _table(title: str, schema: type, keys: list[Key]) -> str:
    rows = [f"| `{key.name}` | {key.kind} | {_code(key.default)} | {key.allowed} | {_text(key.doc)} |" for key in keys]
    head = "| key | type | default | allowed values | meaning |\n|---|---|---|---|---|"
    return "\n".join([f"## {title}\n\n{' '.join((schema.__doc__ or '').split())}\n\n{head}", *rows, ""])


def _text(doc: str) -> str:
    """What a docstring says, for a cell of a table; pages that it names become links."""
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", doc.replace("|", r"\|"))


def _code(default: object) -> str:
    if default is None:
        return ""
    if default == "":
        return '`""`'
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"
