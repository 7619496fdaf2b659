"""Label propagation equals its definition, patch by patch: at edges, with ties, with few frames and small grids."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_lightning.evaluation.video.propagation import SPARE, TILE, Propagation, label_maps, one_hot_labels, tile_axis

C = 3


def spelled_out(
    features: list[Tensor], first_hwC: Tensor, *, last_frames: int, neighborhood: int, top: int, temperature: float
) -> list[np.ndarray]:
    """Labels of frames 1, 2, ... by loops over patches and their sources, in float64."""
    frames = [feature.double().numpy() for feature in features]
    labels = [first_hwC.double().numpy()]
    h, w, _ = frames[0].shape
    for t in range(1, len(frames)):
        context = [0, *range(max(1, t - last_frames), t)]
        result = np.zeros((h, w, first_hwC.shape[-1]))
        for i in range(h):
            for j in range(w):
                weights, taken = [], []
                for s in context:
                    for p in range(h):
                        for q in range(w):
                            near = abs(i - p) <= neighborhood and abs(j - q) <= neighborhood
                            if near or not neighborhood:
                                weights.append(math.exp(cosine(frames[t][i, j], frames[s][p, q]) / temperature))
                                taken.append(labels[s][p, q])
                least = sorted(weights, reverse=True)[:top][-1]
                kept = [weight if weight >= least else 0.0 for weight in weights]
                result[i, j] = sum(weight * label for weight, label in zip(kept, taken, strict=True)) / sum(kept)
        labels.append(result)
    return labels[1:]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    norms = math.sqrt((one * one).sum()) * math.sqrt((other * other).sum())
    return float((one * other).sum() / norms)


def followed(features: list[Tensor], first_hwC: Tensor, **settings: float) -> list[np.ndarray]:
    propagation = Propagation(features[0], first_hwC, **settings)  # type: ignore[arg-type]
    return [propagation.step(feature).double().numpy() for feature in features[1:]]


def settings(**other: float) -> dict[str, float]:
    return {"last_frames": 2, "neighborhood": 2, "top": 5, "temperature": 0.1, **other}


def some_labels(h: int, w: int) -> Tensor:
    return one_hot_labels(torch.randint(0, C, (h, w)), count=C).double()


CASES = {
    "one tile": ((5, 7), settings()),
    "many tiles, the last ones cut": ((TILE + 3, 2 * TILE + 3), settings(neighborhood=1)),
    "tiles in columns only": ((4, 2 * TILE + 1), settings(neighborhood=3)),
    "tiles in rows only": ((TILE + 5, 3), settings()),
    "larger neighborhood than the grid": ((4, 6), settings(neighborhood=12)),
    "no limit": ((4, 13), settings(neighborhood=0)),
    "no frame but the first": ((4, 5), settings(last_frames=0)),
    "more context than frames": ((4, 5), settings(last_frames=7)),
    "fewer sources than top": ((2, 2), settings(last_frames=0, neighborhood=1, top=9)),
    "fewer sources than top at corners alone": ((4, 4), settings(last_frames=0, neighborhood=1, top=6)),
    "one source": ((5, 4), settings(top=1)),
    "sharp": ((5, 4), settings(temperature=0.002)),
}


@pytest.mark.parametrize("case", CASES)
def test_propagation_equals_the_definition(case: str) -> None:
    (h, w), asked = CASES[case]
    features = [torch.randn(h, w, 6, dtype=torch.float64) for _ in range(5 if h * w < 100 else 3)]
    first = some_labels(h, w)
    expected = spelled_out(features, first, **asked)  # type: ignore[arg-type]
    for found, wanted in zip(followed(features, first, **asked), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-12)
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-12)


@pytest.mark.parametrize(("colors", "frames"), [(8, 4), (3, 4), (1, 3)], ids=["some", "many", "all"])
def test_all_sources_that_tie_with_the_last_are_kept(colors: int, frames: int) -> None:
    """Patches of few kinds, so that equal similarities are equal to the last bit."""
    kinds = torch.eye(8, dtype=torch.float64)
    features = [kinds[torch.randint(0, colors, (6, 14))] for _ in range(frames)]
    first = some_labels(6, 14)
    expected = spelled_out(features, first, **settings(top=3))  # type: ignore[arg-type]
    for found, wanted in zip(followed(features, first, **settings(top=3)), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_tiles_beyond_the_grid_are_not_ties() -> None:
    h, w = 2 * TILE + 3, 3 * TILE + 1
    first_hwD = torch.randn(h, w, 4)
    propagation = Propagation(first_hwD, some_labels(h, w), last_frames=1, neighborhood=4, top=5, temperature=0.1)
    assert propagation.rows.count * propagation.rows.tile > h
    values_GQK, _ = propagation._best(propagation._scores(F.normalize(first_hwD, dim=-1), context=1))
    assert values_GQK.shape[-1] == 5 + SPARE


def test_a_still_video_keeps_its_labels() -> None:
    feature = torch.randn(6, 8, 16)
    first = one_hot_labels(torch.randint(0, C, (6, 8)), count=C)
    last = followed([feature] * 6, first, **settings(top=1))[-1]
    np.testing.assert_allclose(last, first.numpy(), atol=1e-6)


def test_float32_is_near() -> None:
    features = [torch.randn(9, 14, 32) for _ in range(4)]
    first = some_labels(9, 14)
    found = followed(features, first.float(), **settings(neighborhood=3))
    exact = followed([feature.double() for feature in features], first, **settings(neighborhood=3))
    # Rounding of similarities, of the order 1e-7, times 1 / temperature, over a few frames.
    np.testing.assert_allclose(found[-1], exact[-1], atol=1e-5)


@pytest.mark.parametrize("neighborhood", [1, 5, 12])
def test_windows_hold_every_neighbor(neighborhood: int) -> None:
    for length in range(1, 120):
        axis = tile_axis(length, neighborhood=neighborhood)
        assert axis.count * axis.tile >= length > (axis.count - 1) * axis.tile
        assert axis.reach == neighborhood or (axis.count == 1 and axis.window == length)


def test_label_maps_by_loops() -> None:
    soft_BhwC = torch.rand(2, 3, 4, C, dtype=torch.float64)
    soft_BhwC[0, ..., 2] = 0
    found = label_maps(soft_BhwC, size=(12, 16))
    for labels_hwC, map_HW in zip(soft_BhwC, found, strict=True):
        maps = [
            F.interpolate(labels_hwC[None, None, ..., c], scale_factor=4, mode="bilinear", align_corners=False)[0, 0]
            for c in range(C)
        ]
        for y in range(12):
            for x in range(16):
                scaled = [
                    float((one[y, x] - one.min()) / (one.max() - one.min())) if one.max() > 0 else 0.0 for one in maps
                ]
                assert int(map_HW[y, x]) == scaled.index(max(scaled))
    assert found.dtype == torch.uint8


@pytest.mark.parametrize("full", [0, 1, 2])
def test_a_label_that_fills_the_frame_keeps_it(full: int) -> None:
    soft_BhwC = one_hot_labels(torch.full((1, 3, 4), full), count=C)
    assert (label_maps(soft_BhwC, size=(6, 8)) == full).all()
