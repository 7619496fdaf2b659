"""MoCo: fits of both versions against an independent loop, the version's settings, and the queue that is saved."""

from pathlib import Path
from typing import Any, cast

import oracles
import pytest
import tiny
import tiny_methods
import torch
import yaml
from composing import SMALL, composed
from method_fits import EXACT, TOTAL, check_fit, rows_in_order
from omegaconf import OmegaConf

from dino_lightning.config import MoCoConfig, TrainConfig
from dino_lightning.config.checks.training import check_config
from dino_lightning.errors import UserError
from dino_lightning.training.run import train

MOMENTUM = {2: oracles.cosine_schedule(0.9, 0.999, TOTAL), 3: oracles.cosine_schedule(0.9, 1.0, TOTAL)}
PUBLISHED: dict[int, dict[str, Any]] = {
    2: {
        "out_dim": 128,
        "head_layers": 2,
        "queue_length": 65536,
        "predictor": False,
        "symmetric": False,
        "temperature": 0.2,
        "loss_scale": 1.0,
        "teacher_momentum": 0.999,
        "teacher_momentum_end": 0.999,
    },
    3: {
        "out_dim": 256,
        "head_layers": 3,
        "head_hidden_dim": 4096,
        "queue_length": 0,
        "predictor": True,
        "symmetric": True,
        "temperature": 0.2,
        "loss_scale": 0.4,
        "teacher_momentum": 0.99,
        "teacher_momentum_end": 1.0,
        "head_batch_norm": True,
    },
}
"""What the papers say."""
SOMEWHERE = ["trainer.accelerator=cpu", "trainer.precision=32", "data.path=."]


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.slow_after_first(2)
def test_a_fit_equals_the_algorithm_of_the_paper(version: int, accumulated: int) -> None:
    reference = {"momentum": MOMENTUM[version], "version": version}
    module, slow = check_fit(f"moco{version}", accumulated=accumulated, views=2, reference=reference)
    if version == 2:
        torch.testing.assert_close(rows_in_order(module.queue), torch.stack(slow.queue.rows), **EXACT)
        assert int(module.queue.filled) == 12


def settings(*words: str) -> MoCoConfig:
    config = cast(TrainConfig, OmegaConf.to_object(composed("method=moco", *SOMEWHERE, *words)))
    check_config(config)
    return cast(MoCoConfig, config.method)


@pytest.mark.parametrize("version", [2, 3])
def test_a_version_sets_the_values_of_its_paper(version: int) -> None:
    found = settings(f"method.version={version}", "experiment=vits16_100ep")
    assert {key: getattr(found, key) for key in PUBLISHED[version]} == PUBLISHED[version]


def test_the_dataclass_alone_is_version_2() -> None:
    assert {key: getattr(MoCoConfig(), key) for key in PUBLISHED[2]} == PUBLISHED[2]


@pytest.mark.parametrize("scale", ["quick", "photos32"])
def test_small_runs_use_the_values_of_the_version(scale: str) -> None:
    two, three = (settings("data=folder", f"experiment={scale}", f"method.version={version}") for version in (2, 3))
    assert (two.queue_length, three.queue_length) == (1024, 0)
    assert (two.predictor, three.predictor) == (False, True)
    assert {two.out_dim, three.out_dim, two.head_hidden_dim, three.head_hidden_dim} == {64, 256}
    assert (two.out_dim, three.out_dim) == (64, 64)


def test_single_keys_override_the_version() -> None:
    single = ["method.queue_length=128", "method.out_dim=32", "method.symmetric=false"]
    found = settings("data=folder", "method.version=3", *single)
    assert (found.queue_length, found.out_dim, found.symmetric, found.predictor) == (128, 32, False, True)


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(UserError, match=r"^method.version=4: choose one of 2, 3"):
        settings("data=folder", "method.version=4")


def test_a_run_saves_its_settings(tmp_path: Path) -> None:
    few = ["trainer.max_steps=2", "callbacks.knn.enabled=false", "callbacks.pictures.enabled=false"]
    train(composed(*SMALL, *few, "method=moco", "method.version=3", "method.out_dim=32", output_dir=tmp_path))
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())["method"]
    assert saved.items() >= {"version": 3, "out_dim": 32, "queue_length": 0, "loss_scale": 0.4}.items()
    assert "$" not in str(saved)


def test_layers_of_both_versions() -> None:
    two, three = (tiny_methods.build(f"moco{version}") for version in (2, 3))
    assert [type(layer).__name__ for layer in two.student.head] == ["Linear", "ReLU", "Linear"]
    normed = ["Linear", "BatchNorm1d", "ReLU"]
    assert [type(layer).__name__ for layer in three.student.head] == [*normed, *normed, "Linear", "BatchNorm1d"]
    assert [type(layer).__name__ for layer in three.predictor] == [*normed, "Linear", "BatchNorm1d"]
    assert three.predictor[-1].weight is None, "the last batch norm neither scales nor shifts"
    assert two.predictor is None
    assert three.queue is None
    assert two.queue is not None


def test_negatives_are_those_before_this_step() -> None:
    """The keys of a batch are not negatives for its own queries."""
    module, (crops,) = tiny_methods.build("moco2").double(), tiny.batches(1)
    module.schedules = module.make_schedules()
    first, again = module.loss(crops[:2]), module.loss(crops[:2])
    assert torch.equal(first, again), "observing alone changes nothing"
    module.after_step(0)
    assert not torch.equal(module.loss(crops[:2]), first)
