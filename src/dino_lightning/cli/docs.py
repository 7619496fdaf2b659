"""`dino docs`: write `docs/configuration.md` from the dataclasses; `--check` fails where the file is out of date."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from dino_lightning.cli.options import parse_options
from dino_lightning.config import SCHEMAS, AutoConfig, EmbedConfig, EvaluateConfig, ExportConfig, TrainConfig
from dino_lightning.config.docs import Key, all_keys
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
    keys = all_keys()
    parts = [HEADER]
    roots = {
        "A training run": TrainConfig,
        "An evaluation": EvaluateConfig,
        "Features of images": EmbedConfig,
        "Weights in another format": ExportConfig,
    }
    for title, root in roots.items():
        parts.append(
            _table(
                title,
                root,
                [key for key in keys if key.schema is root or (root is TrainConfig and key.schema is AutoConfig)],
            )
        )
    for group, schemas in SCHEMAS.items():
        own = [key for key in keys if key.name.startswith(f"{group}.")]
        owners = list(dict.fromkeys(key.schema for key in own))
        for owner in owners:
            names = [name for name, schema in schemas.items() if issubclass(schema, owner)]
            title = f"{group} ({', '.join(names)})" if names and len(schemas) > 1 else group
            nested = [key for key in own if key.schema is owner]
            if not names:  # a part of a group, such as callbacks.knn
                title = nested[0].name.rpartition(".")[0]
            parts.append(_table(title, owner, nested))
    return "\n".join(parts)


def _table(title: str, schema: type, keys: list[Key]) -> str:
    rows = [f"| `{key.name}` | {key.kind} | {_code(key.default)} | {key.allowed} | {_text(key.doc)} |" for key in keys]
    head = [
        f"## {title}",
        "",
        " ".join((schema.__doc__ or "").split()),
        "",
        "| key | type | default | allowed values | meaning |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows, ""])


def _text(doc: str) -> str:
    """What a docstring says, for a cell of a table; pages that it names become links."""
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", doc.replace("|", r"\|"))


def _code(default: object) -> str:
    if default is None:
        return ""
    if default == "":
        return '`""`'
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"
