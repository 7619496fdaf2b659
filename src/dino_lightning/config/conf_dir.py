"""The options of a group, and a backbone read without composing a whole run."""

from typing import Any

from omegaconf import OmegaConf

from dino_lightning.config import SCHEMAS, BackboneConfig
from dino_lightning.runtime.files import CONF, yaml_names


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
