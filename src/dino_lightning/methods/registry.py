"""The table of methods: which class `method=NAME` trains. Methods of this package and of users are added alike."""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dino_lightning.config import MethodConfig
from dino_lightning.config.registry import register_schema
from dino_lightning.methods.base import Method
from dino_lightning.methods.parts import MethodParts

METHODS: dict[type[MethodConfig], type[Method]] = {}
"""Configuration -> method."""

MethodType = TypeVar("MethodType", bound=type[Method])


def register_method(name: str, config: type[MethodConfig]) -> Callable[[MethodType], MethodType]:
    """Class decorator that makes `method=NAME` select the decorated method; the fields of `config` are its keys."""

    def register(method: MethodType) -> MethodType:
        register_schema("method", name, config)
        METHODS[config] = method
        return method

    return register


def import_methods() -> None:
    """Import every file of this folder, so that all methods of the package are registered."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")


def create_method(config: MethodConfig, parts: MethodParts) -> Method:
    """The method of this configuration."""
    import_methods()
    return METHODS[type(config)](config, parts)  # type: ignore[call-arg]
