"""J and F equal their official definitions, pixel by pixel, and their statistics over a video."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_lightning.evaluation.video import davis_scores
from dino_lightning.evaluation.video.davis_scores import (
    boundary,
    boundary_accuracy,
    mean_scores,
    object_scores,
    region_similarity,
    statistics,
)


def blob(height: int, width: int, *, seed: int) -> np.ndarray:
    """A ragged region, smooth at the scale of a few pixels."""
    noise = torch.randn(1, 1, height, width, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.avg_pool2d(noise, 9, stride=1, padding=4)[0, 0] > 0.02).numpy()


def boundary_by_loops(mask: np.ndarray) -> set[tuple[int, int]]:
    """A pixel is on the boundary where the one to the right, below, or right below is on the other side."""
    H, W = mask.shape
    found = set()
    for y in range(H):
        for x in range(W):
            others = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            # On the last row and column the diagonal neighbor replaces the straight one, which is the same pixel.
            others = [(min(a, H - 1), min(b, W - 1)) for a, b in others]
            if any(mask[other] != mask[y, x] for other in others):
                found.add((y, x))
    return found


def accuracy_by_loops(predicted: np.ndarray, true: np.ndarray, *, tolerance: float = 0.008) -> float:
    """F with explicit distances between all pairs of boundary pixels."""
    radius = math.ceil(tolerance * math.sqrt(predicted.shape[0] ** 2 + predicted.shape[1] ** 2))
    one, other = boundary_by_loops(predicted), boundary_by_loops(true)
    if not one or not other:
        precision, recall = float(not one), float(not other)
    else:
        precision = sum(any(math.dist(a, b) <= radius for b in other) for a in one) / len(one)
        recall = sum(any(math.dist(a, b) <= radius for b in one) for a in other) / len(other)
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def as_masks(*masks: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(masks).astype(bool))


def disk(*, center: tuple[int, int], radius: int, height: int = 40, width: int = 60) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2


FULL, EMPTY = np.ones((40, 60), bool), np.zeros((40, 60), bool)
DISK = disk(center=(20, 25), radius=9)
PAIRS = {
    "equal": (DISK, DISK),
    "shifted within the tolerance": (DISK, disk(center=(20, 26), radius=9)),
    "shifted beyond": (DISK, disk(center=(20, 30), radius=9)),
    "larger": (DISK, disk(center=(20, 25), radius=13)),
    "at the lower right border": (disk(center=(38, 57), radius=9), disk(center=(36, 58), radius=9)),
    "at the upper left border": (disk(center=(1, 2), radius=9), disk(center=(3, 0), radius=7)),
    "ragged": (blob(40, 60, seed=1), blob(40, 60, seed=2)),
    "ragged, near": (blob(40, 60, seed=1), np.roll(blob(40, 60, seed=1), 2, axis=1)),
    "nothing predicted": (EMPTY, DISK),
    "nothing to find": (DISK, EMPTY),
    "nothing at all": (EMPTY, EMPTY),
    "everything against an object": (FULL, DISK),
    "everything against nothing": (FULL, EMPTY),
    "one pixel": (disk(center=(5, 5), radius=0), disk(center=(5, 7), radius=0)),
}


@pytest.mark.parametrize("tolerance", [0.008, 0.04])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.slow_after_first(14)
def test_boundary_accuracy_by_loops(pair: str, tolerance: float) -> None:
    predicted, true = PAIRS[pair]
    found = boundary_accuracy(as_masks(predicted), as_masks(true), tolerance=tolerance)
    assert float(found[0]) == pytest.approx(accuracy_by_loops(predicted, true, tolerance=tolerance), abs=1e-12)


@pytest.mark.parametrize("pair", PAIRS)
def test_region_similarity_by_counting(pair: str) -> None:
    predicted, true = PAIRS[pair]
    union = sum(bool(a or b) for a, b in zip(predicted.flat, true.flat, strict=True))
    shared = sum(bool(a and b) for a, b in zip(predicted.flat, true.flat, strict=True))
    expected = shared / union if union else 1.0
    assert float(region_similarity(as_masks(predicted), as_masks(true))[0]) == pytest.approx(expected, abs=1e-12)


def test_frames_are_scored_independently() -> None:
    predicted, true = (as_masks(*masks) for masks in zip(*PAIRS.values(), strict=True))
    for function in (boundary_accuracy, region_similarity):
        together = function(predicted, true)
        apart = torch.cat([function(predicted[i : i + 1], true[i : i + 1]) for i in range(len(PAIRS))])
        torch.testing.assert_close(together, apart, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ragged", "at the lower right border", "everything against nothing"])
def test_boundary_by_loops(name: str) -> None:
    mask = PAIRS[name][0]
    assert set(map(tuple, boundary(as_masks(mask))[0].nonzero().tolist())) == boundary_by_loops(mask)


def test_half_a_right_boundary_by_hand() -> None:
    """The true boundary is two lines 20 pixels apart, the predicted one the first of them: P = 1, R = 1/2, F = 2/3."""
    true, predicted = EMPTY.copy(), EMPTY.copy()
    true[:, 10:30] = True
    predicted[:, 10:] = True
    assert float(boundary_accuracy(as_masks(predicted), as_masks(true))[0]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 7, 10, 24, 88, 300])
def test_statistics(frames: int) -> None:
    values = np.random.default_rng(frames).random(frames)
    # Borders of quarters from frame 1 to frame n, rounded; each quarter includes both of its borders.
    borders = [math.floor(1 + (frames - 1) * part / 4 + 0.5) - 1 for part in range(5)]
    quarters = [values[start : end + 1] for start, end in pairwise(borders)]
    mean, recall, decay = statistics(values)
    assert mean == pytest.approx(sum(values) / frames)
    assert recall == pytest.approx(sum(value > 0.5 for value in values) / frames)
    assert decay == pytest.approx(sum(quarters[0]) / len(quarters[0]) - sum(quarters[3]) / len(quarters[3]))


def test_halves_do_not_count_as_recalled() -> None:
    assert statistics(np.array([0.5, 0.5, 0.51, 0.2]))[1] == 0.25


def labels(*objects: np.ndarray) -> np.ndarray:
    """Objects 1, 2, ... in one map."""
    return np.max([number * mask.astype(np.uint8) for number, mask in enumerate(objects, start=1)], axis=0)


def moving(shift: int) -> Tensor:
    """Six frames with two disks that move, `shift` pixels aside."""
    maps = [
        labels(disk(center=(15, 10 + 2 * t + shift), radius=8), disk(center=(30, 45 - t - shift), radius=6))
        for t in range(6)
    ]
    return torch.from_numpy(np.stack(maps))


def test_perfect_masks() -> None:
    for scores in object_scores(moving(0), moving(0), objects=2):
        assert scores.values() == [100, 100, 0, 100, 100, 0]
        assert scores.j_and_f_mean == 100


def test_first_and_last_frame_do_not_count() -> None:
    predicted = moving(0)
    predicted[[0, -1]] = 0
    assert [scores.j_and_f_mean for scores in object_scores(predicted, moving(0), objects=2)] == [100, 100]
    predicted[1] = 0
    assert all(scores.j_mean == pytest.approx(75) for scores in object_scores(predicted, moving(0), objects=2))


@pytest.mark.parametrize("at_once", [1, 2 * 40 * 60, 2**23], ids=["frame by frame", "two frames", "all"])
@pytest.mark.slow_after_first(1)
def test_shifted_masks_by_loops(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(davis_scores, "CHUNK_PIXELS", at_once)
    predicted, true = moving(2), moving(0)
    found = object_scores(predicted, true, objects=2)
    for number, scores in enumerate(found, start=1):
        pairs = [(p.numpy() == number, t.numpy() == number) for p, t in zip(predicted[1:-1], true[1:-1], strict=True)]
        j = np.array([(p & t).sum() / (p | t).sum() for p, t in pairs])
        f = np.array([accuracy_by_loops(p, t) for p, t in pairs])
        expected = [100 * value for value in (*statistics(j), *statistics(f))]
        assert scores.values() == pytest.approx(expected, abs=1e-9)
    assert mean_scores(found).f_mean == pytest.approx((found[0].f_mean + found[1].f_mean) / 2)


def test_an_object_that_is_never_predicted() -> None:
    predicted = torch.where(moving(0) == 2, 0, moving(0)).to(torch.uint8)
    first, second = object_scores(predicted, moving(0), objects=2)
    assert first.j_and_f_mean == 100
    assert second.values() == [0] * 6
