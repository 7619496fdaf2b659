"""Two ranks over gloo train and choose linear classifiers as one process with the same total batch."""

from typing import Any

import linear_ranks_worker
import pytest
import torch


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of both ranks, and of one process."""
    folder = tmp_path_factory.mktemp("linear")
    torch.set_num_threads(1)  # as in the ranks: an earlier test may have trained with more, which reorders sums
    ranks = linear_ranks_worker.launch(folder)
    assert [seen["rank"] for seen in ranks] == [0, 1]
    return [*ranks, linear_ranks_worker.evaluated(folder, ranks=1)]


@pytest.mark.parametrize("name", ["fast", "linear"])
def test_figures(found: list[dict[str, Any]], name: str) -> None:
    first, second, alone = found
    assert first[name] == second[name] == alone[name]
    assert first[f"{name}_details"] == second[f"{name}_details"] == alone[f"{name}_details"]


def test_the_grid_classifier_is_bit_identical(found: list[dict[str, Any]]) -> None:
    for key, weights in found[0]["fast_weights"].items():
        assert torch.equal(weights, found[2]["fast_weights"][key])


def test_gradients_are_averaged(found: list[dict[str, Any]]) -> None:
    """Float32: only the order of sums differs."""
    for key, weights in found[0]["linear_weights"].items():
        assert weights.abs().max() > 0.01
        torch.testing.assert_close(weights, found[2]["linear_weights"][key], rtol=1e-5, atol=1e-6)
