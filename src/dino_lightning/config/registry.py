"""The options of a group such as `method` or `backbone`: their names, and how further ones are registered."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from dino_lightning.config import SCHEMAS, BackboneConfig
from dino_lightning.runtime.files import CONF, yaml_names


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


def option_names(group: str) -> list[str]:
    """The options of a group: its files under `conf/` and the dataclasses in `SCHEMAS`."""
    return yaml_names(CONF / group, also=SCHEMAS.get(group, ()))


def backbone_names() -> list[str]:
    """The options of `backbone` that name a network."""
    return [name for name in option_names("backbone") if name != "timm"]


def backbone_config(name: str) -> BackboneConfig:
    """The network of `backbone=NAME`."""
    config: Any = OmegaConf.to_object(_merged(name))
    return config


def _merged(name: str) -> Any:
    """The file `conf/backbone/NAME.yaml` over its `defaults`, or the dataclass of this name."""
    path = CONF / "backbone" / f"{name}.yaml"
    if not path.exists():
        return OmegaConf.structured(SCHEMAS["backbone"][name.removeprefix("schema_")])
    values: Any = OmegaConf.load(path)
    bases = [_merged(parent) for parent in values.pop("defaults", []) if parent != "_self_"]
    return OmegaConf.merge(*bases, values)
