"""Makes a configuration dataclass selectable by name: `method=NAME`, `data=NAME`."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from hydra.core.config_store import ConfigStore

from dino_lightning.config import SCHEMAS


def register_schema(group: str, name: str, config: type[Any]) -> None:
    """Make `GROUP=NAME` compose to `config`, and `schema_NAME` usable in `defaults` lists.

    `SCHEMAS` already contains the built-in dataclasses, so that a command composes without importing their code. For
    them this does nothing.
    """
    if SCHEMAS[group].get(name) is config:
        return
    SCHEMAS[group][name] = config
    for stored_name in (name, f"schema_{name}"):
        ConfigStore.instance().store(group=group, name=stored_name, node=config)


FOLDERS = {"method": "methods", "backbone": "models"}
"""Group -> room of this package whose files may register a configuration of their own."""


def import_component(group: str, name: str) -> None:
    """Import `methods/NAME.py` or `models/NAME.py`, if it exists, for an unknown `GROUP=NAME`: it may register it."""
    if group in FOLDERS and name not in SCHEMAS[group] and name.isidentifier():
        module = f"dino_lightning.{FOLDERS[group]}.{name}"
        if find_spec(module):
            import_module(module)
