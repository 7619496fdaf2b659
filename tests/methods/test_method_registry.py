"""A user's method whose config derives from one of the package's."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import pytest
import tiny
from composing import composed
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch import Tensor, nn

from dino_lightning.config import SCHEMAS, DINOConfig, TrainConfig
from dino_lightning.methods.base import Method
from dino_lightning.methods.dino import DINO
from dino_lightning.methods.parts import MethodParts
from dino_lightning.methods.registry import METHODS, create_method, register_method
from dino_lightning.training.build import build_method


@dataclass
class OwnConfig(DINOConfig):
    """DINO with one more key."""

    share: float = 0.5


@pytest.fixture
def own() -> Iterator[type[Method]]:
    """A registered method, until the end of a test."""

    @register_method("own", OwnConfig)
    class Own(Method):
        """Not DINO, although its config is a DINOConfig."""

        def __init__(self, config: OwnConfig, parts: MethodParts) -> None:
            super().__init__(parts, nn.Identity())

        def loss(self, batch: list[Tensor]) -> Tensor:
            return self.student(batch).mean()

    yield Own
    del METHODS[SCHEMAS["method"].pop("own")]
    for option in ("own", "schema_own"):
        del ConfigStore.instance().repo["method"][f"{option}.yaml"]


def test_the_exact_type_of_the_config_decides(own: type[Method]) -> None:
    config = cast(TrainConfig, OmegaConf.to_object(composed("experiment=quick")))
    assert isinstance(build_method(config), DINO)
    config.method = OwnConfig(out_dim=64, share=0.25)
    assert isinstance(build_method(config), own)


def test_a_registered_method_has_an_option_and_a_schema(own: type[Method]) -> None:
    assert composed("method=own").method.share == 0.5
    assert composed("method=schema_own", "method.share=0.1").method.share == 0.1


def test_each_config_of_the_package_has_a_method() -> None:
    create_method(DINOConfig(), tiny.parts())
    assert set(SCHEMAS["method"].values()) == set(METHODS)
