"""A method of one's own that is a kind of one of ours."""

from dataclasses import dataclass
from typing import Any, cast

import pytest
from composing import composed
from omegaconf import OmegaConf

from dino_lightning.config import DINOConfig, TrainConfig
from dino_lightning.methods.dino import DINO
from dino_lightning.training import build


@dataclass
class OwnConfig(DINOConfig):
    """DINO with a key more."""

    share: float = 0.5


def test_it_is_built_by_its_own_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def make(config: OwnConfig, **options: Any) -> DINO:
        made.append(config)
        return DINO(config, **options)

    monkeypatch.setitem(build.METHODS, OwnConfig, make)
    config = cast(TrainConfig, OmegaConf.to_object(composed("experiment=quick")))
    assert isinstance(build.build_method(config), DINO)
    assert not made, "the plain one is ours"
    config.method = OwnConfig(out_dim=64, share=0.25)
    assert isinstance(build.build_method(config), DINO)
    assert made == [config.method]
