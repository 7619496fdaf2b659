"""Threads and memory of a run on a CPU."""

from typing import cast

import pytest
from composing import composed
from omegaconf import OmegaConf

from dino_lightning.config import TrainConfig
from dino_lightning.training import resources
from dino_lightning.training.build import build_method


def config_of(*overrides: str) -> TrainConfig:
    return cast(TrainConfig, OmegaConf.to_object(composed(*overrides)))


@pytest.mark.parametrize(
    ("cores", "devices", "workers", "pixels", "threads"),
    [(8, 1, 2, 32, 6), (8, 2, 1, 32, 3), (2, 1, 4, 32, 1), (8, 1, 2, 224, 8), (8, 2, 2, 96, 4), (1, 2, 1, 224, 1)],
)
def test_small_crops_leave_a_core_to_each_loader(
    cores: int, devices: int, workers: int, pixels: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    config = config_of(f"data.num_workers={workers}", f"crops.global_size={pixels}")
    assert resources.cpu_threads(config, processes=devices) == threads


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("", True),
        ("trainer.precision=bf16-mixed", False),
        ("compute=reference", False),
        ("compute=checkpointed", False),
        ("compute=compiled", False),
        ("backbone.drop_path=subset", False),
        ("backbone=convnext_tiny", False),
    ],
)
@pytest.mark.slow_after_first(3)
def test_memory_is_retained_if_tiles_limit_it(overrides: str, expected: bool) -> None:
    config = config_of(*overrides.split())
    assert resources.trains_in_tiles(config, build_method(config)) == expected
