"""Makes a configuration dataclass selectable by name: `method=NAME`, `data=NAME`."""

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
