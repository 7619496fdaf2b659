"""Thresholded attention and its Jaccard index against slow loops over heads, patches and pixels."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_lightning.evaluation.attention.masks import (
    VOID,
    attended_area,
    jaccard_indices,
    mass_masks,
    pixels_of_patches,
)


def slow_mask(values: list[float], mass: float) -> list[bool]:
    """Drop the weakest patches as long as what is dropped, this one included, is no more than 1 - mass."""
    order = sorted(range(len(values)), key=lambda i: values[i])  # stable: of equal ones the earlier comes first
    kept, dropped = [True] * len(values), 0.0
    for i in order:
        dropped += values[i]
        if dropped / sum(values) > 1 - mass:
            break
        kept[i] = False
    return kept


def slow_jaccard(mask_hw: Tensor, object_HW: Tensor, ignored_HW: Tensor) -> float:
    """Pixel by pixel, each looking up its patch."""
    p = object_HW.shape[0] // mask_hw.shape[0]
    both = either = 0
    for y in range(object_HW.shape[0]):
        for x in range(object_HW.shape[1]):
            if ignored_HW[y, x]:
                continue
            predicted, true = bool(mask_hw[y // p, x // p]), bool(object_HW[y, x])
            both += predicted and true
            either += predicted or true
    return both / either


def attention(heads: int, h: int, w: int, *, seed: int = 0) -> Tensor:
    """Of a softmax whose class token keeps some of it."""
    scores = 2 * torch.randn(2, heads, h * w, generator=torch.Generator().manual_seed(seed))
    return 0.9 * scores.softmax(-1).unflatten(-1, (h, w))


@pytest.mark.parametrize("mass", [0.6, 0.8, 1.0, 0.05])
def test_masks_keep_the_strongest_patches(mass: float):
    maps = attention(3, 5, 7)
    masks = mass_masks(maps, masses=[mass])
    assert masks.shape == (1, 2, 3, 5, 7)
    assert masks.dtype == torch.bool
    for b in range(2):
        for head in range(3):
            expected = slow_mask(maps[b, head].flatten().double().tolist(), mass)
            assert masks[0, b, head].flatten().tolist() == expected


def test_masks_have_the_mass_with_the_fewest_patches():
    maps = attention(4, 6, 6)
    shares = maps / maps.sum((-2, -1), keepdim=True)
    for kept, mass in zip(mass_masks(maps, masses=[0.6, 0.8]), [0.6, 0.8], strict=True):
        inside = (shares * kept).sum((-2, -1))
        weakest = torch.where(kept, shares, torch.inf).amin((-2, -1))
        assert (inside >= mass - 1e-6).all()
        assert (inside - weakest < mass + 1e-6).all()
        assert (torch.where(kept, -torch.inf, shares).amax((-2, -1)) <= weakest).all()


def test_of_equal_patches_the_first_are_dropped():
    maps = torch.full((1, 1, 2, 4), 0.125)
    maps[0, 0, 1, 0] = 0.5
    # 1 - 0.6 of 1.375: the sums of the weakest exceed it from the fifth 0.125 on.
    assert mass_masks(maps, masses=[0.6])[0, 0, 0].int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]


def test_scale_of_the_attention_does_not_matter():
    maps = attention(3, 5, 7)
    # By a power of two: every sum is exactly as before.
    assert mass_masks(maps, masses=[0.6]).equal(mass_masks(maps / 4, masses=[0.6]))


def labeled(h: int, w: int, p: int, *, seed: int) -> Tensor:
    """Two objects and a void rim, from blobs that do not follow the patches."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((h * p, w * p), np.uint8)
    labels[2:9, 1:11], labels[6:13, 8:17] = 7, 15
    labels[rng.random(labels.shape) < 0.1] = VOID
    return torch.from_numpy(labels)


@pytest.mark.parametrize("seed", range(3))
def test_jaccards_are_those_of_pixels(seed: int):
    p, maps = 3, attention(4, 5, 6, seed=seed)[0]
    labels = labeled(5, 6, p, seed=seed)
    masses = [0.6, 0.8]
    found = jaccard_indices(maps, labels, masses=masses)
    assert found is not None
    nothing, void = torch.zeros_like(labels, dtype=torch.bool), labels == VOID
    for m, mass in enumerate(masses):
        masks = [torch.tensor(slow_mask(head.flatten().double().tolist(), mass)).reshape(5, 6) for head in maps]
        # The snippet of the authors: for each object the best head; void counts as background.
        by_object = [[slow_jaccard(mask, labels == o, nothing) for mask in masks] for o in (7, 15)]
        assert found.best[m].item() == pytest.approx(sum(max(heads) for heads in by_object) / 2, abs=1e-12)
        foreground = (labels == 7) | (labels == 15)
        for head in range(4):
            mean = (by_object[0][head] + by_object[1][head]) / 2
            assert found.heads[m, head].item() == pytest.approx(mean, abs=1e-12)
            expected = slow_jaccard(masks[head], foreground, void)
            assert found.foreground[m, head].item() == pytest.approx(expected, abs=1e-12)


def test_attention_on_the_object_alone_is_perfect():
    maps = torch.zeros(2, 4, 4)
    maps[0, 1:3, 1:3], maps[1, 0, 0] = 0.2, 0.9
    labels = torch.zeros(16, 16, dtype=torch.uint8)
    labels[4:12, 4:12] = 1
    # 1 - 0.8 leaves no place to drop a fourth of the mass.
    found = jaccard_indices(maps, labels, masses=[0.8])
    assert found is not None
    assert found.best.tolist() == [1.0]
    assert found.heads.tolist() == [[1.0, 0.0]]


def test_image_without_an_object_has_no_figure():
    labels = torch.zeros(8, 8, dtype=torch.uint8)
    labels[:2] = VOID
    assert jaccard_indices(torch.rand(2, 4, 4), labels, masses=[0.6]) is None


def test_area_is_the_share_of_kept_patches():
    maps = torch.zeros(2, 2, 5)
    maps[0, 0, 0], maps[1] = 1.0, 0.1
    # One patch of ten; and six of ten equal ones, to hold 0.55.
    assert attended_area(maps, masses=[0.55]).tolist() == pytest.approx([(0.1 + 0.6) / 2])


def test_pixels_are_counted_exactly():
    masks = torch.rand(3, 12, 18) < 0.5
    counts = pixels_of_patches(masks, p=6)
    for o in range(3):
        for y in range(2):
            for x in range(3):
                assert counts[o, y, x] == masks[o, 6 * y : 6 * y + 6, 6 * x : 6 * x + 6].sum()
