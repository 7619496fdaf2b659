"""k-NN against loops written from its definition, against scikit-learn, and over ranks."""

import math
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dino_lightning.evaluation.features.knn import _pack, _unpack, knn_accuracy, nearest_neighbors

CPU = torch.device("cpu")
T = 0.07


def _clusters(n: int, *, classes: int, width: int, seed: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features around one center per class; the centers do not depend on the seed."""
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    return centers[labels] + noise * torch.randn(n, width, generator=generator), labels


def _cosine(a: list[float], b: list[float]) -> float:
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


def _ranking(bank: list, labels: list[int], query: list[float], *, k: int, classes: int) -> list[int]:
    """Classes, best first, from the definition: double precision, one Python number at a time."""
    similarities = [_cosine(query, row) for row in bank]
    neighbors = sorted(range(len(bank)), key=lambda i: (-similarities[i], i))[:k]
    votes = [0.0] * classes
    for i in neighbors:
        votes[labels[i]] += math.exp(similarities[i] / T)
    return sorted(range(classes), key=lambda c: (-votes[c], c))


def _oracle(
    bank: Tensor, labels: Tensor, queries: Tensor, targets: Tensor, *, k: list[int], classes: int
) -> dict[int, dict[str, float]]:
    result = {}
    for wanted in k:
        rankings = [
            _ranking(bank.tolist(), labels.tolist(), query, k=wanted, classes=classes) for query in queries.tolist()
        ]
        n = min(wanted, len(bank))
        hits = {
            guesses: sum(
                target in ranking[: min(guesses, n)] for ranking, target in zip(rankings, targets, strict=True)
            )
            for guesses in (1, 5)
        }
        result[wanted] = {f"top{guesses}": 100 * hit / len(queries) for guesses, hit in hits.items()}
    return result


@pytest.mark.parametrize(
    ("n_bank", "n_queries", "classes"),
    [(150, 40, 8), (50, 50, 3), (12, 5, 4), (30, 10, 1), (1, 1, 2), (60, 20, 1200)],
)
def test_accuracy_equals_the_definition(n_bank: int, n_queries: int, classes: int) -> None:
    bank, labels = _clusters(n_bank, classes=classes, width=6, seed=1)
    queries, targets = _clusters(n_queries, classes=classes, width=6, seed=2)
    k = [1, 3, 10, 20, 200]
    got = knn_accuracy(bank, labels, queries, targets, k=k, temperature=T, num_classes=classes, device=CPU)
    want = _oracle(bank, labels, queries, targets, k=k, classes=classes)
    # Both are counts over the same total; float32 similarities would have to swap two votes to differ.
    assert got == want
    if (n_bank, classes) == (150, 8):
        assert 30 < want[10]["top1"] < 95, "too easy or too hard to detect an error"
        assert want[1]["top5"] == want[1]["top1"], "k neighbors allow at most k guesses"


@pytest.mark.parametrize("k", [1, 5, 10, 20, 100, 200])
def test_predictions_equal_scikit_learn(k: int) -> None:
    bank, labels = _clusters(400, classes=6, width=8, seed=1)
    queries, _ = _clusters(120, classes=6, width=8, seed=2)
    theirs = KNeighborsClassifier(
        n_neighbors=k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / T)
    )
    predicted = torch.from_numpy(theirs.fit(bank.double().numpy(), labels.numpy()).predict(queries.double().numpy()))
    ours = knn_accuracy(bank, labels, queries, predicted, k=[k], temperature=T, num_classes=6, topk=(1,), device=CPU)
    assert ours == {k: {"top1": 100.0}}, "a query was classified otherwise"


def test_nearest_is_the_sorted_list_of_cosines() -> None:
    bank, _ = _clusters(300, classes=5, width=7, seed=1)
    queries, _ = _clusters(11, classes=5, width=7, seed=2)
    similarities, indices = nearest_neighbors(bank, queries, k=9, device=CPU)
    assert similarities.shape == indices.shape == (11, 9)
    assert similarities.dtype == torch.float32
    for row, query in enumerate(queries.tolist()):
        cosines = [_cosine(query, other) for other in bank.tolist()]
        order = sorted(range(300), key=lambda i: -cosines[i])[:9]
        assert indices[row].tolist() == order
        # Seven products in float32.
        assert similarities[row].tolist() == pytest.approx([cosines[i] for i in order], abs=1e-6)


@pytest.mark.parametrize(("bank_chunk", "query_chunk"), [(1, 1), (7, 7), (7, 1), (1, 10**6), (64, 16)])
@pytest.mark.slow_after_first(1)
def test_chunks_do_not_change_the_result(bank_chunk: int, query_chunk: int) -> None:
    bank, labels = _clusters(101, classes=9, width=16, seed=1)
    queries, targets = _clusters(50, classes=9, width=16, seed=2)
    chunks = {"bank_chunk": bank_chunk, "query_chunk": query_chunk}
    whole, pieces = (
        nearest_neighbors(bank, queries, k=30, device=CPU),
        nearest_neighbors(bank, queries, k=30, device=CPU, **chunks),
    )
    assert torch.equal(whole[1], pieces[1])
    # Matrix products of other shapes may add in another order.
    torch.testing.assert_close(whole[0], pieces[0], rtol=0, atol=1e-6)
    accuracies = [
        knn_accuracy(bank, labels, queries, targets, k=[5, 20], temperature=T, num_classes=9, device=CPU, **sizes)
        for sizes in ({}, chunks)
    ]
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize("bank_chunk", [1, 3, 100])
def test_equal_similarities_go_to_the_lower_index(bank_chunk: int) -> None:
    """Axes: the cosines are exactly -1, 0 and 1 in any order of summation."""
    axes = torch.eye(4)
    bank = torch.stack([axes[1], axes[0], -axes[2], axes[0], -axes[0], axes[0] * 3, axes[3], axes[0]])
    similarities, indices = nearest_neighbors(bank, axes[:1], k=8, device=CPU, bank_chunk=bank_chunk)
    assert indices.tolist() == [[1, 3, 5, 7, 0, 2, 6, 4]]
    assert similarities.tolist() == [[1, 1, 1, 1, 0, 0, 0, -1]]


def test_equal_votes_go_to_the_lower_class() -> None:
    """A collapsed network: all features are the same, so each of k neighbors has one vote."""
    bank, queries = torch.ones(6, 3), torch.ones(4, 3)
    labels = torch.tensor([2, 1, 1, 2, 0, 0])
    got = knn_accuracy(
        bank, labels, queries, torch.tensor([0, 1, 2, 3]), k=[1, 2, 3, 4], temperature=T, num_classes=4, device=CPU
    )
    # k=1: only class 2. k=2: 1 before 2. k=3: 1. k=4: 1 before 2, then the voteless 0 and 3: four guesses hit all.
    assert [got[k]["top1"] for k in (1, 2, 3, 4)] == [25, 25, 25, 25]
    assert [got[k]["top5"] for k in (1, 2, 3, 4)] == [25, 50, 75, 100]
    alone = knn_accuracy(
        bank, labels, queries, torch.tensor([1, 1, 1, 1]), k=[1, 2], temperature=T, num_classes=4, device=CPU
    )
    assert (alone[1]["top1"], alone[2]["top1"]) == (0, 100)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_classify_nothing(value: float) -> None:
    """A comparison with NaN is false, so no class would be ranked before the right one."""
    bank_ND, bank_labels_N = _clusters(40, classes=3, width=8, seed=0, noise=0.1)
    queries_MD, labels_M = _clusters(30, classes=3, width=8, seed=1, noise=0.1)
    words = {"k": [1, 10], "temperature": T, "num_classes": 3, "device": CPU}
    everything = knn_accuracy(torch.full_like(bank_ND, value), bank_labels_N, queries_MD, labels_M, **words)
    assert everything == {k: {"top1": 0.0, "top5": 0.0} for k in (1, 10)}
    queries_MD[:15, 3] = value
    half = knn_accuracy(bank_ND, bank_labels_N, queries_MD, labels_M, **words)
    assert {figures["top1"] for figures in half.values()} == {50.0}


def test_the_temperature_weights_close_neighbors() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, 0.6], [0.8, 0.6]])
    labels = torch.tensor([1, 0, 0, 0])
    query, target = torch.tensor([[2.0, 0.0]]), torch.tensor([1])

    def top1(temperature: float) -> float:
        result = knn_accuracy(bank, labels, query, target, k=[4], temperature=temperature, num_classes=2, device=CPU)
        return result[4]["top1"]

    # Three votes of exp(0.8 / T) against one of exp(1 / T): even at T = 0.2 / ln 3 = 0.182.
    assert (top1(0.17), top1(0.19)) == (100, 0)
    assert top1(1e-4) == 100, "exp(1 / T) overflows where votes are not scaled"


def test_a_neighbor_fits_into_one_integer() -> None:
    values = torch.tensor([[1.0, 0.5, 1e-30, 0.0, -0.0, -1e-30, -0.5, -1.0]])
    keys = _pack(values, first=2**32 - 8)
    assert keys[0].tolist() == sorted(keys[0].tolist(), reverse=True)
    assert keys[0].diff().abs()[3] == 1, "0.0 and -0.0 differ by their index alone"
    similarities, indices = _unpack(keys)
    assert torch.equal(similarities, values)
    assert indices[0].tolist() == list(range(2**32 - 8, 2**32))


class Products(TorchDispatchMode):
    """Notes dtype and precision setting of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[torch.dtype, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.mm:
            self.seen.add((args[0].dtype, torch.get_float32_matmul_precision()))
        return func(*args, **(kwargs or {}))


def test_similarities_are_float32_under_autocast() -> None:
    bank, _ = _clusters(20, classes=5, width=64, seed=1)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16), Products() as products:
            nearest_neighbors(bank.bfloat16(), bank[:9].bfloat16(), k=20, device=CPU)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert products.seen == {(torch.float32, "highest")}


def test_wrong_input_is_refused() -> None:
    bank, labels, none = torch.ones(2, 3), torch.tensor([0, 1]), torch.empty(0, dtype=torch.int64)
    settings = {"k": [1], "temperature": T, "device": CPU}
    with pytest.raises(ValueError, match=r"-1 \.\.\. 1 are outside 0 \.\.\. 1"):
        knn_accuracy(bank, torch.tensor([-1, 1]), bank, labels, num_classes=2, **settings)
    with pytest.raises(ValueError, match=r"outside 0 \.\.\. 0"):
        knn_accuracy(bank, labels, bank, labels, num_classes=1, **settings)
    with pytest.raises(ValueError, match="one query"):
        knn_accuracy(bank, labels, torch.empty(0, 3), none, num_classes=2, **settings)
    with pytest.raises(ValueError, match="in the bank"):
        knn_accuracy(torch.empty(0, 3), none, bank, labels, num_classes=2, **settings)


WORLD = 2
SHARED = [51, 1]
"""Numbers of queries: unequal shards, and fewer than ranks."""


def _accuracy_of(queries: Tensor, targets: Tensor) -> dict[int, dict[str, float]]:
    bank, labels = _clusters(120, classes=7, width=6, seed=1)
    return knn_accuracy(bank, labels, queries, targets, k=[5, 20], temperature=T, num_classes=7, device=CPU)


def _run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for n in SHARED:
        queries, targets = _clusters(n, classes=7, width=6, seed=2)
        torch.save(_accuracy_of(queries[rank::WORLD], targets[rank::WORLD]), f"{folder}/{n}_{rank}.pt")
    dist.destroy_process_group()


def test_ranks_together_have_the_result_of_one_process(tmp_path: Path) -> None:
    on_ranks(_run_rank, str(tmp_path), ranks=WORLD)
    for n in SHARED:
        alone = _accuracy_of(*_clusters(n, classes=7, width=6, seed=2))
        assert [torch.load(tmp_path / f"{n}_{rank}.pt") for rank in range(WORLD)] == [alone] * WORLD


def _measure_memory(rank: int, file: str) -> None:
    bank, queries = torch.randn(200_000, 16), torch.randn(64, 16)
    nearest_neighbors(bank[:24_576], queries, k=20, device=CPU)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    nearest_neighbors(bank, queries, k=20, device=CPU)
    torch.save(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, file)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_does_not_grow_with_the_bank(tmp_path: Path) -> None:
    """All similarities at once would take 4 x 64 x 200,000 bytes = 49 MiB; 25 chunks take what 3 take."""
    on_ranks(_measure_memory, str(tmp_path / "kib"), ranks=1)
    assert 0 <= torch.load(tmp_path / "kib") < 32 * 1024
