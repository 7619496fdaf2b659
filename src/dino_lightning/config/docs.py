"""All keys of the configuration with type, default, allowed values and documentation, read from the dataclasses."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, get_type_hints

from omegaconf import MISSING

from dino_lightning.config import SCHEMAS, EmbedConfig, EvaluateConfig, ExportConfig, TrainConfig
from dino_lightning.config.constraints import ranges_of
from dino_lightning.config.ranges import FilePath

ROOTS = {"train": TrainConfig, "eval": EvaluateConfig, "embed": EmbedConfig, "export": ExportConfig}
"""Verb -> the dataclass of its configuration."""


@dataclass(frozen=True)
class Key:
    """One key, such as `optim.lr`."""

    name: str
    kind: str
    """Type, in words."""
    default: Any
    doc: str
    schema: type
    """The dataclass that declares it."""
    allowed: str = ""
    """Allowed values, in words; empty if its type alone limits them."""


def all_keys() -> list[Key]:
    """Every key of every schema; a key of several options of a group appears once for each class that declares it."""
    keys = [key for prefix, schema in _schemas() for key in keys_of(schema, prefix=prefix)]
    return list({(key.name, key.schema): key for key in keys}.values())


def path_keys() -> set[str]:
    """Every key whose value is a path, or a name inside a folder."""
    ranges = ((prefix, *item) for prefix, schema in _schemas() for item in ranges_of(schema).items())
    return {f"{prefix}{name}" for prefix, name, allowed in ranges if allowed is FilePath}


def _schemas() -> Iterator[tuple[str, type]]:
    """Prefix of its keys and dataclass of each command and of each option of a group."""
    yield from (("", root) for root in ROOTS.values())
    yield from ((f"{group}.", schema) for group, options in SCHEMAS.items() for schema in options.values())


def keys_of_root(root: type) -> frozenset[str]:
    """Every key of one command, and its groups, such as {"seed", "optim", "optim.lr"}.

    Keys of all options of a group are included.
    """
    groups = [field.name for field in dataclasses.fields(root) if field.name in SCHEMAS]
    schemas = [(f"{group}.", schema) for group in groups for schema in SCHEMAS[group].values()]
    keys = [key.name for prefix, schema in [("", root), *schemas] for key in keys_of(schema, prefix=prefix)]
    return frozenset(groups + keys)


def keys_of(schema: type, *, prefix: str = "") -> Iterator[Key]:
    """The keys of a dataclass, those of its nested dataclasses included; of a command, without its groups."""
    types, ranges = get_type_hints(schema), ranges_of(schema)
    for field in dataclasses.fields(schema):
        owner, kind = _declaring_class(schema, field.name), types[field.name]
        if not prefix and field.name in SCHEMAS:
            continue
        if dataclasses.is_dataclass(kind):
            yield from keys_of(kind, prefix=f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            doc = _field_docs(owner)[field.name]
            allowed = ranges[field.name].expected if field.name in ranges else ""
            yield Key(f"{prefix}{field.name}", _type_name(kind), _default(field), doc, owner, allowed)


def _declaring_class(schema: type, field_name: str) -> type:
    return next(owner for owner in schema.__mro__ if field_name in inspect.get_annotations(owner))


@cache  # Python searches the complete file for the source of a class
def _field_docs(schema: type) -> dict[str, str]:
    """Field -> the string literal below it, which Python discards."""
    (class_node,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(class_node, ast.ClassDef)
    docs = {}
    for node, below in pairwise(class_node.body):
        match node, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                docs[name] = " ".join(doc.split())
    return docs


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not NO_DEFAULT:
        return field.default_factory()
    return None if field.default in (NO_DEFAULT, MISSING) and field.default is not None else field.default


def _type_name(annotation: Any) -> str:
    if annotation is Any:
        return "any"
    name = (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )
    return name.replace("typing.", "").replace("None", "null").replace(" | ", " or ")
