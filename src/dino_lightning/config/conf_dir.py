"""Where the YAML files are, and an option of `backbone` read from them without composing a whole run."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dino_lightning.config import SCHEMAS, BackboneConfig

PACKAGE = Path(__file__).parents[1]
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parents[1] / "conf"
"""Folder of the YAML files: inside an installed wheel, beside `src/` in a checkout."""


def option_names(folder: Path) -> list[str]:
    """The options of a group, by its folder; those of a folder in it as FOLDER/NAME, at the end."""
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
    return sorted(names, key=lambda name: (name.count("/"), name))


def backbone_names() -> list[str]:
    """The files of `conf/backbone` that name a network."""
    return sorted(path.stem for path in (CONF / "backbone").glob("*.yaml") if path.stem != "timm")


def backbone_config(name: str) -> BackboneConfig:
    """The network of `conf/backbone/NAME.yaml`."""
    config: Any = OmegaConf.to_object(_merged(name))
    return config


def _merged(name: str) -> Any:
    """The schema or file of this name under those that its `defaults` list."""
    if name.startswith("schema_"):
        return OmegaConf.structured(SCHEMAS["backbone"][name.removeprefix("schema_")])
    values: Any = OmegaConf.load(CONF / "backbone" / f"{name}.yaml")
    below = [_merged(parent) for parent in values.pop("defaults", []) if parent != "_self_"]
    return OmegaConf.merge(*below, values)
