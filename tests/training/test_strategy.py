"""Lightning's strategies for the names of `trainer.strategy`."""

from typing import Any, cast

import pytest
import torch
from composing import SMALL, composed
from lightning.pytorch.strategies import SingleDeviceStrategy
from omegaconf import OmegaConf
from timm.layers import BatchNormAct2d
from torch import nn

from dino_lightning.config import TrainerConfig
from dino_lightning.config.constraints import ranges_of
from dino_lightning.config.ranges import OneOf
from dino_lightning.models.backbones import build_backbone
from dino_lightning.training.build import build_trainer
from dino_lightning.training.strategy import (
    DataParallel,
    FullySharded,
    SharedStatistics,
    build_strategy,
    has_separate_statistics,
)


def built(strategy: str, **options: Any) -> Any:
    return build_strategy(TrainerConfig(**{"accelerator": "cpu", "devices": 2, "strategy": strategy, **options}))


@pytest.mark.parametrize(("name", "start_method"), [("auto", "popen"), ("ddp", "popen"), ("ddp_notebook", "fork")])
def test_data_parallel(name: str, start_method: str) -> None:
    strategy = built(name)
    assert type(strategy) is DataParallel
    assert strategy._start_method == start_method
    assert strategy._ddp_kwargs["gradient_as_bucket_view"]
    assert strategy._ddp_kwargs["static_graph"]
    assert not strategy._ddp_kwargs["find_unused_parameters"]


def test_unused_parameters_change_the_graph() -> None:
    strategy = built("ddp_find_unused_parameters_true")
    assert strategy._ddp_kwargs["find_unused_parameters"]
    assert not strategy._ddp_kwargs["static_graph"]


def test_accumulated_steps_change_what_is_reduced() -> None:
    assert not built("ddp", accumulate_grad_batches=2)._ddp_kwargs["static_graph"]


def test_several_nodes_of_one_device() -> None:
    assert type(built("auto", devices=1, num_nodes=2)) is DataParallel


def test_one_device_needs_no_strategy() -> None:
    assert built("auto", devices=1) == "auto"


def test_fsdp() -> None:
    assert type(built("fsdp")) is FullySharded


def test_every_accepted_name_builds_a_strategy() -> None:
    strategies = ranges_of(TrainerConfig)["strategy"]
    assert isinstance(strategies, OneOf)
    kinds = {str(name): type(built(str(name))) for name in strategies.values}
    assert kinds.pop("fsdp") is FullySharded
    assert set(kinds.values()) == {DataParallel}


@pytest.mark.parametrize(
    ("devices", "kind"), [(1, SingleDeviceStrategy), (2, DataParallel)], ids=["one device", "two devices"]
)
def test_strategy_of_a_run(devices: int, kind: type, tmp_path: Any) -> None:
    config: Any = OmegaConf.to_object(composed(*SMALL, f"trainer.devices={devices}", output_dir=tmp_path))
    assert type(build_trainer(config, hyperparameters={}).strategy) is kind


@pytest.mark.parametrize(
    ("layers", "separate"),
    [
        ([nn.LayerNorm(3)], False),
        ([nn.LayerNorm(3), nn.BatchNorm1d(3)], True),
        ([nn.Sequential(nn.BatchNorm2d(3))], True),
        ([nn.SyncBatchNorm(3)], False),
        ([nn.SyncBatchNorm(3), nn.BatchNorm2d(3)], True),
    ],
)
def test_statistics_that_differ_between_ranks(layers: list[nn.Module], separate: bool) -> None:
    module = nn.Sequential(*layers)
    module.register_buffer("center", torch.zeros(3))
    assert has_separate_statistics(module) is separate


def test_shared_statistics_keep_the_activation_inside_a_batch_norm() -> None:
    config = cast(Any, OmegaConf.to_object(composed("backbone=vovnet_micro"))).backbone
    network = build_backbone(config, image_size=32, drop_path=False)
    before = [norm.act for norm in network.modules() if isinstance(norm, BatchNormAct2d)]
    assert before
    shared = SharedStatistics().apply(nn.ModuleList([network, nn.BatchNorm1d(3)]))
    norms = [part for part in shared.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert [norm.act for norm in norms if hasattr(norm, "act")] == before
    assert not has_separate_statistics(shared)
