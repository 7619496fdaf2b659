"""The table of data sources: which function opens the images of a configuration dataclass.

A source of your own is registered like the built-in ones, in a file that `imports=FILE` reads:

    @register_source("my_images", MyImagesConfig)
    def open_my_images(config: MyImagesConfig) -> Splits: ...

Then `data=my_images` selects it, and its fields are the keys `data.*`.
"""

import importlib
from collections.abc import Callable
from typing import TypeVar

from dino_lightning.config import SCHEMAS, DataConfig
from dino_lightning.config.registry import register_schema
from dino_lightning.data.sources.base import Splits

C = TypeVar("C", bound=DataConfig)

SOURCES: dict[type[DataConfig], Callable[..., Splits]] = {}
"""Configuration dataclass -> the function that opens its images; `register_source` fills it."""


def register_source(name: str, config: type[C]) -> Callable[[Callable[[C], Splits]], Callable[[C], Splits]]:
    """Decorate the function that opens a source: it is called with an instance of `config` for `data=NAME`.

    `config` is a dataclass derived from `DataConfig`. The function raises `UserError` for wrong settings. If it returns
    a labeled `ImageSource` without a validation split, `open_sources` holds out `data.holdout` of the images.
    """

    def register(open_source: Callable[[C], Splits]) -> Callable[[C], Splits]:
        register_schema("data", name, config)
        SOURCES[config] = open_source
        return open_source

    return register


def source_for(config: DataConfig) -> Callable[..., Splits]:
    """The function that opens the images of `config`.

    A built-in source is imported at first use, because some need libraries that take seconds to import. Its module has
    the name of the source.
    """
    kind = type(config)
    if kind not in SOURCES:
        name = next((name for name, schema in SCHEMAS["data"].items() if schema is kind), None)
        if name is None:
            raise TypeError(f"no source is registered for {kind.__name__}; use @register_source")
        importlib.import_module(f"{__package__}.{name}")
    return SOURCES[kind]
