"""The folder of the YAML files, the options of a group, and a backbone read without composing a whole run."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dino_lightning.config import SCHEMAS, BackboneConfig

PACKAGE = Path(__file__).parents[1]
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parents[1] / "conf"
"""Folder of the YAML files: inside an installed wheel, next to `src/` in a checkout."""


def option_names(folder: Path) -> list[str]:
    """The options of a group, by its folder: its files and the dataclasses in `SCHEMAS`.

    Files in a subfolder are FOLDER/NAME, at the end of the list. A subfolder with the name of a file, such as
    `preset/quick/`, contains parts of that option, which are left out.
    """
    paths = [path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml")]
    options = {path.as_posix() for path in paths if path.parent not in paths} | set(SCHEMAS.get(folder.name, ()))
    return sorted(options, key=lambda name: (name.count("/"), name))


def backbone_names() -> list[str]:
    """The options of `backbone` that name a network."""
    return [name for name in option_names(CONF / "backbone") if name != "timm"]


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
