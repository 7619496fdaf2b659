"""Two ranks over gloo train every method as one process with the same total batch.

Assignments, queues and negatives are those of all ranks.
"""

from dataclasses import replace
from typing import Any

import method_ranks_worker
import pytest
import tiny_methods
import torch
from method_ranks_worker import CASES, RANKS, STEPS

EXACT = {"rtol": 1e-8, "atol": 1e-11}
"""Float64: only the order of sums differs."""


SLOW = ("dino, softmax", "byol, fsdp", "moco 2, accumulated", "moco 2, fsdp", "moco 3", "swav", "supervised, fsdp")
FAST = tuple(name for name in CASES if name not in SLOW)
Ranks = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def fast_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return method_ranks_worker.launch(tmp_path_factory.mktemp("methods"), *FAST)


@pytest.fixture(scope="module")
def slow_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return method_ranks_worker.launch(tmp_path_factory.mktemp("slow_methods"), *SLOW)


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_two_ranks_train_like_one_process(name: str, request: pytest.FixtureRequest) -> None:
    both = request.getfixturevalue("slow_ranks" if name in SLOW else "fast_ranks")
    case, ranks = CASES[name], [rank[name] for rank in both]
    window = 2 if case.batch_norm else 1
    module, batches = method_ranks_worker.module_and_batches(replace(case, accumulate=window), ranks=1)
    alone = tiny_methods.fit(module, batches, accumulate_grad_batches=window)
    means = torch.tensor([rank["losses"] for rank in ranks]).double().unflatten(1, (STEPS, -1)).mean(dim=(0, 2))
    expected = torch.tensor(alone.losses).double().unflatten(0, (STEPS, -1)).mean(dim=1)
    torch.testing.assert_close(means, expected, rtol=1e-6, atol=0)
    assert ranks[0]["losses"] != ranks[1]["losses"], "the ranks have different images"
    for rank in ranks:
        assert rank["state"].keys() == alone.states[-1].keys()
        for key, tensor in rank["state"].items():
            torch.testing.assert_close(tensor, alone.states[-1][key], **EXACT, msg=f"{key} differs")
    assert all(torch.equal(ranks[0]["state"][key], ranks[1]["state"][key]) for key in alone.states[-1])
    assert bool(ranks[0]["sharded"]) == (case.strategy == "fsdp")


def test_cases_cover_every_method_full_queues_and_sharded_predictors(fast_ranks: Ranks) -> None:
    assert {case.method for case in CASES.values()} == {"dino", *tiny_methods.CONFIGS}
    state = fast_ranks[0]["swav, queue"]["state"]
    assert int(state["queues.0.filled"]) == 11 < STEPS * method_ranks_worker.BATCH
    assert int(fast_ranks[0]["moco 2"]["state"]["queue.filled"]) == 12
    assert "predictor.weight" in fast_ranks[0]["swav, queue, fsdp"]["sharded"]
    assert RANKS == 2
