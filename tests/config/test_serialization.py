"""The configuration in checkpoints, compared with OmegaConf's conversion."""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from composing import composed
from omegaconf import OmegaConf

from dino_lightning.config import TrainConfig
from dino_lightning.config.serialization import from_plain, to_dict


class Side(Enum):
    LEFT = 1
    RIGHT = 2


@dataclass
class UserDefined:
    """Values of a user's own schema that none of ours has."""

    side: Side = Side.RIGHT
    sides: list[Side] = field(default_factory=lambda: [Side.LEFT])
    by_name: dict[str, Any] = field(default_factory=lambda: {"a": [1, 2.5, None], "b": {"c": True}})
    by_side: dict[Side, int] = field(default_factory=lambda: {Side.LEFT: 3})
    pair: tuple[int, int] = (1, 2)


def _by_omegaconf(config: Any) -> Any:
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)


@pytest.mark.parametrize("words", [[], ["method=moco", "optim=lars"], ["data=folder", "data.path=."]], ids=str)
def test_values_equal_those_of_omegaconf(words: list[str], tmp_path: Path) -> None:
    config = cast(TrainConfig, OmegaConf.to_object(composed(*words, output_dir=tmp_path)))
    plain = to_dict(config)
    assert plain["values"] == _by_omegaconf(config)
    assert from_plain(plain, source="it") == config


def test_values_of_a_user_defined_schema_load_from_a_checkpoint(tmp_path: Path) -> None:
    values = to_dict(cast(TrainConfig, UserDefined()))["values"]
    assert values == _by_omegaconf(UserDefined())
    torch.save(values, tmp_path / "values.pt")
    assert torch.load(tmp_path / "values.pt", weights_only=True) == values
