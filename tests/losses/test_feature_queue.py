"""Embeddings of former batches: which rows the queue contains, in which order, and which state is saved."""

import torch
from torch import Tensor

from dino_lightning.losses.feature_queue import FeatureQueue

LENGTH, WIDTH = 7, 3


def queue(*, start_random: bool = False) -> FeatureQueue:
    return FeatureQueue(LENGTH, WIDTH, start_random=start_random)


def rows(first: int, count: int) -> Tensor:
    """Rows whose values are their number."""
    return torch.arange(first, first + count).float().unsqueeze(1).expand(count, WIDTH).clone()


def numbers(of: FeatureQueue) -> list[int]:
    """From the oldest to the newest."""
    return [int(row[0]) for row in of.features.roll(-int(of.position), dims=0)]


def test_the_latest_rows_are_kept() -> None:
    given, arrived = queue(), 0
    for count in (2, 3, 1, 4, 7, 6, 3):
        given.observe(rows(arrived + 1, count))
        given.update()
        arrived += count
        expected = list(range(max(1, arrived - LENGTH + 1), arrived + 1))
        assert numbers(given) == [0] * (LENGTH - len(expected)) + expected
        assert given.is_full == (arrived >= LENGTH)
        assert int(given.filled) == min(arrived, LENGTH)


def test_a_batch_larger_than_the_queue_leaves_its_last_rows() -> None:
    given = queue()
    given.observe(rows(1, 3))
    given.update()
    given.observe(rows(4, 20))
    given.update()
    assert sorted(numbers(given)) == list(range(17, 24))
    assert given.is_full
    given.observe(rows(24, 2))
    given.update()
    assert numbers(given) == list(range(19, 26)), "the two oldest have left"


def test_nothing_enters_before_commit_and_micro_batches_enter_together() -> None:
    given, at_once = queue(), queue()
    for part in rows(1, 6).chunk(3):
        given.observe(part)
        assert not given.features.any()
    given.update()
    at_once.observe(rows(1, 6))
    at_once.update()
    assert torch.equal(given.features, at_once.features)
    given.update()
    assert torch.equal(given.features, at_once.features), "without an observation nothing moves"


def test_an_unfilled_queue_has_random_rows() -> None:
    given = queue(start_random=True)
    torch.testing.assert_close(given.features.norm(dim=1), torch.ones(LENGTH))
    assert not given.is_full
    before = given.features.clone()
    given.observe(rows(1, 2))
    given.update()
    assert torch.equal(given.features[2:], before[2:])


def test_everything_except_pending_rows_is_saved() -> None:
    given, copy = queue(start_random=True), queue(start_random=True)
    given.observe(rows(1, 5))
    given.update()
    given.observe(rows(6, 1))  # pending: part of no checkpoint
    copy.load_state_dict(given.state_dict())
    assert set(given.state_dict()) == {"features", "position", "filled"}
    for each in (given, copy):
        each._observed.clear()
        each.observe(rows(6, 4))
        each.update()
    assert torch.equal(given.features, copy.features)
    assert torch.equal(given.position, copy.position)


def test_rows_are_copied_and_carry_no_gradient() -> None:
    given, row = queue(), rows(1, 1).requires_grad_()
    given.observe(row)
    with torch.no_grad():
        row.zero_()
    given.update()
    assert numbers(given)[-1] == 1
    assert not given.features.requires_grad
    assert not list(given.parameters())


def test_half_precision_rows_are_converted_to_float32() -> None:
    given = queue()
    given.observe(rows(1, 2).bfloat16())
    given.update()
    assert given.features.dtype == torch.float32
    assert numbers(given)[-2:] == [1, 2]
