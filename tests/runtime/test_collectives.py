"""Each collective function equals a sum or a concatenation in one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor

from dino_lightning.losses.centering import Center
from dino_lightning.runtime import collectives as distributed

WORLD = 3
ROWS = [2, 0, 3]


def _statistic(rank: int) -> Tensor:
    return torch.tensor([[1.5, -2.0], [0.25, 8.0]]) * (rank + 1)


def _rows(rank: int) -> Tensor:
    return torch.arange(ROWS[rank] * 4.0).reshape(ROWS[rank], 4) + 100 * rank


def _later(rank: int) -> list[Tensor]:
    """Two concurrent sums of a tensor that changes meanwhile; the second is awaited first, and twice."""
    changing = _statistic(rank).requires_grad_()
    first = distributed.all_reduce_sum_later(changing)
    with torch.no_grad():
        changing.mul_(2)
    second = distributed.all_reduce_sum_later(changing)
    with torch.no_grad():
        changing.zero_()
    return [second(), first(), second()]


def _center(rank: int) -> Tensor:
    """The center after two micro-batches of the rank's rows, the second of ones."""
    center = Center(4, momentum=0.5).double()
    for rows in (_rows(rank), torch.ones(ROWS[rank], 4)):
        center.observe(rows.double().sum(dim=0), count=len(rows))
    center.update()
    return center.center


def _run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    statistic = _statistic(rank).requires_grad_()
    column = torch.arange(6).reshape(3, 2).T[rank % 2 :]
    results: dict[str, object] = {
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
        "sum": distributed.all_reduce_sum(statistic),
        "sum of int": distributed.all_reduce_sum(torch.tensor(2**40 + rank)),
        "mean": distributed.all_reduce_mean(statistic),
        "later": _later(rank),
        "center": _center(rank),
        "rows": distributed.all_gather_concat(_rows(rank)),
        "labels": distributed.all_gather_concat(torch.full((rank + 1,), rank)),
        "none anywhere": distributed.all_gather_concat(torch.empty(0, 5)),
        "not contiguous": distributed.all_gather_concat(column),
        "argument": statistic.detach(),
    }
    distributed.leave_group()
    results["left"] = not dist.is_initialized()
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    on_ranks(_run_rank, str(folder), ranks=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_ranks_are_numbered(ranks: list[dict]) -> None:
    assert [(result["rank"], result["world_size"]) for result in ranks] == [(0, 3), (1, 3), (2, 3)]


def test_reductions(ranks: list[dict]) -> None:
    total = _statistic(0) + _statistic(1) + _statistic(2)
    for rank, result in enumerate(ranks):
        # Every value and sum is a short binary fraction: exact.
        assert torch.equal(result["sum"], total)
        # A division by 3 rounds, perhaps in another operation.
        torch.testing.assert_close(result["mean"], total / 3, rtol=1e-6, atol=0)
        assert result["sum of int"] == 3 * 2**40 + 3
        assert torch.equal(result["argument"], _statistic(rank)), "the argument was changed"
        assert not result["sum"].requires_grad


def test_later_sums_use_the_values_at_their_start(ranks: list[dict]) -> None:
    total = _statistic(0) + _statistic(1) + _statistic(2)
    for result in ranks:
        assert [torch.equal(a, b) for a, b in zip(result["later"], (2 * total, total, 2 * total), strict=True)] == [
            True
        ] * 3
        assert not any(tensor.requires_grad for tensor in result["later"])


def test_every_row_of_every_rank_weighs_the_same_in_the_center(ranks: list[dict]) -> None:
    rows = torch.cat([torch.cat([_rows(rank), torch.ones(ROWS[rank], 4)]) for rank in range(WORLD)])
    for result in ranks:
        torch.testing.assert_close(result["center"], 0.5 * rows.double().mean(0, keepdim=True), rtol=1e-13, atol=0)


def test_gather_keeps_the_order_of_ranks_and_drops_the_padding(ranks: list[dict]) -> None:
    for result in ranks:
        assert torch.equal(result["rows"], torch.cat([_rows(0), _rows(1), _rows(2)]))
        assert result["labels"].tolist() == [0, 1, 1, 2, 2, 2]
        assert result["labels"].dtype == torch.int64
        assert result["none anywhere"].shape == (0, 5)
        assert result["not contiguous"].tolist() == [[0, 2, 4], [1, 3, 5], [1, 3, 5], [0, 2, 4], [1, 3, 5]]


def test_leaving_closes_the_group(ranks: list[dict]) -> None:
    assert all(result["left"] for result in ranks)


def test_without_a_group_there_is_one_rank() -> None:
    distributed.leave_group()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    value = torch.tensor([1.0, 2.0], requires_grad=True)

    def later(tensor: Tensor) -> Tensor:
        return distributed.all_reduce_sum_later(tensor)()

    for function in (distributed.all_reduce_sum, distributed.all_reduce_mean, distributed.all_gather_concat, later):
        result = function(value)
        assert result.tolist() == [1.0, 2.0]
        assert not result.requires_grad
        result.add_(1)
    assert value.tolist() == [1.0, 2.0], "the result shares memory with the argument"


def test_mean_of_integers_is_refused() -> None:
    with pytest.raises(AssertionError, match="whole numbers"):
        distributed.all_reduce_mean(torch.tensor([1, 2]))
