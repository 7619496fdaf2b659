"""Two ranks over gloo train as one process with the same total batch, each with whole networks (DDP) or with slices."""

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

sys.path.insert(0, str(Path(__file__).parent))
import ranks_worker

EXACT = {"rtol": 1e-9, "atol": 1e-12}
"""Float64: only the order of sums differs."""


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    results = ranks_worker.launch(request.param, tmp_path_factory.mktemp("ranks"))
    assert {*results[0]["sharded"], *results[1]["sharded"]} == {request.param == "fsdp"}
    return results


@pytest.fixture(scope="module")
def alone() -> tuple[tiny.Record, ranks_worker.Gradients, Any]:
    module, whole = ranks_worker.module_and_batches()
    module.batch_size_per_device = 8
    gradients = ranks_worker.Gradients()
    return tiny.fit(module, whole, callbacks=[gradients], max_epochs=ranks_worker.EPOCHS), gradients, module


def test_losses(ranks: list[dict[str, Any]], alone: Any) -> None:
    mean = (torch.tensor(ranks[0]["losses"]) + torch.tensor(ranks[1]["losses"])) / 2
    torch.testing.assert_close(mean.double(), torch.tensor(alone[0].losses).double(), rtol=1e-6, atol=0)
    assert ranks[0]["losses"] != ranks[1]["losses"], "each rank has images of its own"


def test_learning_rate_scales_with_the_total_batch(ranks: list[dict[str, Any]], alone: Any) -> None:
    assert ranks[0]["rates"] == alone[0].rates


def test_centre(ranks: list[dict[str, Any]], alone: Any) -> None:
    for rank in ranks:
        for ours, expected in zip(rank["centers"], alone[0].centers, strict=True):
            torch.testing.assert_close(ours, expected, **EXACT)


def test_gradients(ranks: list[dict[str, Any]], alone: Any) -> None:
    for rank in ranks:
        for ours, expected in zip(rank["gradients"], alone[1].seen, strict=True):
            assert ours.keys() == expected.keys()
            for name, gradient in ours.items():
                torch.testing.assert_close(gradient, expected[name], **EXACT, msg=name)


def test_some_gradients_are_clipped(alone: Any) -> None:
    norms = [gradient.norm() for step in alone[1].seen for gradient in step.values()]
    assert {bool(norm > ranks_worker.CLIP) for norm in norms} == {True, False}


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_weights_in_the_end(network: str, ranks: list[dict[str, Any]], alone: Any) -> None:
    expected = tiny.copy(getattr(alone[2], network))
    for rank in ranks:
        for name, weight in rank[network].items():
            torch.testing.assert_close(weight, expected[name], **EXACT, msg=name)
    assert all(torch.equal(ranks[0][network][name], ranks[1][network][name]) for name in expected)
