"""`dino docs`: write `docs/configuration.md` from the dataclasses; `--check` fails where the file is out of date."""

import re
import sys
from pathlib import Path

from dino_lightning.config import SCHEMAS, AutoConfig, EmbedConfig, EvaluateConfig, ExportConfig, TrainConfig
from dino_lightning.config.docs import Key, all_keys

TARGET = Path(__file__).parents[3] / "docs" / "configuration.md"

HEADER = """# Configuration

Made by `dino docs` from the dataclasses in `src/dino_lightning/config/`; do not edit. A group is chosen as
`group=option`, a key set as `group.key=value`. The options of each group are the files under `conf/GROUP/`.

A *duration* is a string with a unit: `10ep` (epochs), `500it` (optimizer steps) or `10%` (of the run).
"""


def main() -> None:
    """Write or check the page."""
    if not TARGET.parent.is_dir():
        sys.exit("dino docs writes docs/configuration.md of a checkout, and this is an installed package")
    page = render()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(page)
    elif not TARGET.exists() or TARGET.read_text() != page:
        sys.exit("docs/configuration.md is out of date: run dino docs")


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
