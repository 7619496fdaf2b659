"""A configuration in plain types, so that a file alone says how a run was made."""

from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dino_lightning.config import SCHEMAS, TrainConfig
from dino_lightning.config.registry import import_component
from dino_lightning.errors import UserError, did_you_mean


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """`values`, nested as the keys are, and `schemas`, the name of each group's dataclass in `SCHEMAS`."""
    schemas = {
        group: name
        for group, known in SCHEMAS.items()
        for name, schema in known.items()
        if type(getattr(config, group, None)) is schema
    }
    return {"schemas": schemas, "values": _plain(config)}


def _plain(value: Any) -> Any:
    """As `OmegaConf.to_container` of `OmegaConf.structured`, which takes 100 times as long."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.name if isinstance(value, Enum) else value


def from_plain(plain: Any, *, source: str) -> TrainConfig:
    """The configuration again. Raises `UserError`, which names `source`, for one that this version does not know."""
    try:
        schemas, values = dict(plain["schemas"]), dict(plain["values"])
        composed = OmegaConf.structured(TrainConfig)
        for group, name in schemas.items():
            import_component(group, name)
            if name not in SCHEMAS[group]:
                raise UserError(
                    f"{source} is of {group}={name}: set imports=[FILE] if it is in a file of yours; "
                    f"{did_you_mean(name, SCHEMAS[group])}"
                )
            composed[group] = OmegaConf.structured(SCHEMAS[group][name])
        return cast(TrainConfig, OmegaConf.to_object(OmegaConf.merge(composed, values)))
    except (OmegaConfBaseException, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source} holds no configuration that this version knows ({reason}).") from error
