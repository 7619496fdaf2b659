"""Ranks that differ end before their first step, all with the same message."""

from collections.abc import Iterable
from typing import Any

import pytest
import rank_consistency_worker
import torch
from rank_consistency_worker import CASES, IMAGES

from dino_lightning.errors import RanksDifferError
from dino_lightning.training.callbacks.rank_consistency import compare, settings, weights

Seen = list[dict[str, dict[str, Any]]]

EXPECTED = {
    "a key": "rank 1 has method.student_temperature=0.2, but rank 0 has method.student_temperature=0.1: ",
    "a nested list": "rank 1 has crops.local_scale=[0.1, 0.4], but rank 0 has crops.local_scale=",
    "the seed": "rank 1 has seed=1, but rank 0 has seed=0: ",
    "fewer images": f"rank 1 has number of training images={IMAGES - 7}, but rank 0 has number of training images=18",
    "another name": "rank 1 has digest of names and labels of the ",
    "another class": "rank 1 has digest of names and labels of the ",
    "weights": "rank 1 has checksum of weights=",
    "the code": "rank 1 has code=",
    "a version": "rank 1 has version of timm=0.0.1, but rank 0 has version of timm=",
}


FAST = ("a key", "fewer images", "another class", "weights", "the code", "alike")
SLOW = tuple(name for name in CASES if name not in FAST)


def cases(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return rank_consistency_worker.launch(tmp_path_factory.mktemp("fast"), *FAST)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return rank_consistency_worker.launch(tmp_path_factory.mktemp("slow"), *SLOW)


@pytest.fixture
def ranks(name: str, request: pytest.FixtureRequest) -> Seen:
    return request.getfixturevalue("slow" if name in SLOW else "fast")


@pytest.mark.parametrize("name", cases(sorted(set(CASES) - set(EXPECTED))))
def test_permitted_differences_train(name: str, ranks: Seen) -> None:
    assert [rank[name] for rank in ranks] == [{"said": "", "steps": 1, "rank": number} for number in (0, 1)]


@pytest.mark.parametrize("name", cases(EXPECTED))
def test_the_rank_is_named_before_the_first_step(name: str, ranks: Seen) -> None:
    first, second = (rank[name] for rank in ranks)
    assert first["said"] == second["said"]
    assert first["said"].startswith(EXPECTED[name])
    assert first["steps"] == second["steps"] == 0


def test_the_deviating_rank_is_named() -> None:
    """With its host name, even if it is the first rank; host names are omitted if all ranks share one."""
    ranks = [("a", {"seed": "1"}), ("a", {"seed": "0"}), ("b", {"seed": "0"}), ("b", {"seed": "0"})]
    with pytest.raises(RanksDifferError, match=r"^rank 0 on a has seed=1, but rank 1 on a has seed=0: "):
        compare(ranks)
    with pytest.raises(RanksDifferError, match=r"^rank 1 has seed=1 \(and 1 more .*\), but rank 0 has seed=0"):
        compare([("a", {"seed": seed}) for seed in "01011"[:2] + "0100"])
    with pytest.raises(RanksDifferError, match=r"rank 1 has data\.path=nothing, but rank 0 has data\.path=x"):
        compare([("a", {"data.path": "x"}), ("a", {})])
    compare([("a", {"seed": "1"})] * 5)


def test_a_checksum_detects_other_weights_but_not_rounding() -> None:
    torch.manual_seed(0)
    first, second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    rounded = torch.nn.Linear(64, 64)
    rounded.load_state_dict({name: value * (1 + 1e-7) for name, value in first.state_dict().items()})
    compare([("a", weights(first)), ("a", weights(rounded))])
    with pytest.raises(RanksDifferError, match="checksum"):
        compare([("a", weights(first)), ("a", weights(second))])


def test_settings_are_compared_by_dotted_key() -> None:
    config = {"data": {"path": "/here", "channels": 3}, "output_dir": "out", "crops": {"mean": [0.1, 0.2]}}
    assert settings(config) == {"data.channels": "3", "crops.mean": "[0.1, 0.2]"}
