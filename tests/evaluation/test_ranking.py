"""Average precision against loops written from its definition, on random rankings with junk and ties."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles_ranking import AT, area, definition, ranked
from slow_params import first
from torch import Tensor

from dino_lightning.data.benchmarks.revisited import load_data_pickle
from dino_lightning.evaluation.retrieval.ranking import NOT_RETRIEVABLE, average_precision_at_top, rank_database


def _case(seed: int, *, queries: int, images: int, levels: int) -> tuple[Tensor, list[list[int]], list[list[int]]]:
    """Similarities of few levels, so that most are tied, and disjoint positives (of the first query none) and junk."""
    rng = np.random.default_rng(seed)
    similarity = torch.from_numpy(rng.integers(0, levels, (queries, images)).astype(np.float32) / levels)
    positives, junk = [], []
    for query in range(queries):
        order = rng.permutation(images).tolist()
        first, second = rng.integers(0, images // 2 + 1, 2).tolist() if query else (0, 1)
        positives.append(order[:first])
        junk.append(order[first : first + second])
    return similarity, positives, junk


@pytest.mark.parametrize(
    ("queries", "images", "levels"), [(30, 40, 5), (30, 40, 10_000), (40, 6, 2), (20, 3, 1), (5, 1, 1)]
)
def test_average_precision_equals_the_definition(queries: int, images: int, levels: int) -> None:
    similarity, positives, junk = _case(queries + images, queries=queries, images=images, levels=levels)
    got = rank_database(similarity, positives=positives, junk=junk, at=AT)
    want = [definition(*case) for case in zip(similarity.tolist(), positives, junk, strict=True)]
    # Both in float64; only the order of a sum of at most N terms differs.
    np.testing.assert_allclose(got.ap, [ap for ap, _ in want], rtol=0, atol=1e-14)
    np.testing.assert_array_equal(got.precision, [precisions for _, precisions in want])
    counted = [(ap, precisions) for ap, precisions in want if not math.isnan(ap)]
    assert got.queries == len(counted) < queries
    if counted:
        assert got.map == pytest.approx(sum(ap for ap, _ in counted) / len(counted), abs=1e-14)
        for k, mean in enumerate(got.mean_precision):
            assert mean == pytest.approx(sum(precisions[k] for _, precisions in counted) / len(counted), abs=1e-14)


@pytest.mark.parametrize(
    ("name", "levels"),
    first([("roxford5k", 50), ("rparis6k", 1_000_000), ("roxford5k", 1_000_000), ("rparis6k", 50)], fast=2),
)
def test_average_precision_on_the_real_ground_truth(name: str, levels: int, shared_data: Path) -> None:
    with open(shared_data / "retrieval" / name / f"gnd_{name}.pkl", "rb") as file:
        truth = load_data_pickle(file)
    rng = np.random.default_rng(levels)
    chosen = sorted(rng.permutation(70)[:6].tolist())
    gnd = [truth["gnd"][i] for i in chosen]
    noise = rng.integers(0, levels, (len(gnd), len(truth["imlist"])))
    for row, own in zip(noise, gnd, strict=True):  # a search that is better than chance
        row[own["easy"]] += levels // 2
        row[own["hard"]] += levels // 4
    similarity = torch.from_numpy(noise.astype(np.float32))
    for right, neither in (("easy",), ("junk", "hard")), (("easy", "hard"), ("junk",)), (("hard",), ("junk", "easy")):
        positives = [[i for key in right for i in own[key]] for own in gnd]
        junk = [[i for key in neither for i in own[key]] for own in gnd]
        got = rank_database(similarity, positives=positives, junk=junk, at=AT)
        want = [definition(*case) for case in zip(similarity.tolist(), positives, junk, strict=True)]
        np.testing.assert_allclose(got.ap, [ap for ap, _ in want], rtol=0, atol=1e-12)
        np.testing.assert_array_equal(got.precision, [precisions for _, precisions in want])


def test_small_rankings_by_hand() -> None:
    falling = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    assert rank_database(falling, positives=[[0, 1]], junk=[[]]).map == 1
    # At rank 1: (0 / 1 + 1 / 2) / 2. With the first image junk it moves up to rank 0.
    assert rank_database(falling, positives=[[1]], junk=[[]]).map == 0.25
    assert rank_database(falling, positives=[[1]], junk=[[0]]).map == 1
    assert rank_database(falling, positives=[[1]], junk=[[2, 3]]).map == 0.25
    # Precision at 5 and 10 stops at the last positive, rank 1: one of two.
    assert rank_database(falling, positives=[[1]], junk=[[]]).mean_precision == [0, 0.5, 0.5]


def test_the_lower_index_wins_a_tie() -> None:
    equal = torch.full((1, 500), 0.5)
    assert rank_database(equal, positives=[[0]], junk=[[]]).map == 1
    last = rank_database(equal, positives=[[499]], junk=[[]]).map
    assert last == pytest.approx((0 + 1 / 500) / 2, abs=1e-15)


def test_unretrievable_images_are_never_found() -> None:
    similarity = torch.tensor([[0.9, NOT_RETRIEVABLE, 0.1], [NOT_RETRIEVABLE, 0.2, 0.1]])
    got = rank_database(similarity, positives=[[0, 1], [0]], junk=[[], [1]])
    # Half of the recall is reached with precision 1; the second query finds nothing.
    assert got.ap.tolist() == [0.5, 0]
    assert got.precision.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert got.queries == 2


def test_a_query_without_positives_counts_in_no_mean() -> None:
    similarity = torch.tensor([[0.3, 0.2], [0.3, 0.2]])
    got = rank_database(similarity, positives=[[], [0]], junk=[[0], []])
    assert got.queries == 1
    assert got.map == 1
    assert got.mean_precision == [1, 1, 1]
    nothing = rank_database(similarity[:1], positives=[[]], junk=[[]])
    assert nothing.queries == 0
    assert math.isnan(nothing.map)


@pytest.mark.parametrize("top", [1, 3, 20])
def test_average_precision_at_the_top(top: int) -> None:
    similarity, positives, _ = _case(top, queries=30, images=40, levels=7)
    order = [ranked(row)[:top] for row in similarity.tolist()]
    got = average_precision_at_top(torch.tensor(order), positives=positives)
    for ap, found, own in zip(got.tolist(), order, positives, strict=True):
        if not own:
            assert math.isnan(ap)
            continue
        ranks = [rank for rank, place in enumerate(found) if place in own]
        assert ap == pytest.approx(area(ranks, total=len(own)), abs=1e-14)


def test_the_whole_database_at_the_top_is_the_ranking_without_junk() -> None:
    similarity, positives, _ = _case(3, queries=20, images=25, levels=4)
    order = similarity.sort(dim=1, descending=True, stable=True).indices
    whole = rank_database(similarity, positives=positives, junk=[[]] * 20).ap
    torch.testing.assert_close(average_precision_at_top(order, positives=positives), whole, equal_nan=True)
