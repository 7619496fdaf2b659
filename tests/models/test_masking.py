"""Masks of patches: compared with a slow loop that draws the same numbers, and properties of all masks."""

import math

import numpy as np
import pytest
import torch

from dino_lightning.models.masking import Masks, blocks, draw_masks

GRIDS = [(14, 14), (4, 4), (6, 9), (1, 5), (1, 1)]


def slow_blocks(generator: np.random.Generator, h: int, w: int, wanted: int) -> set[tuple[int, int]]:
    """Rectangle after rectangle, patch by patch."""
    masked: set[tuple[int, int]] = set()
    while len(masked) < wanted:
        for attempt in range(1, 11):
            missing = wanted - len(masked)
            area = generator.uniform(min((min(h, w) // 3) ** 2, missing), missing)
            ratio = math.exp(generator.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
            if height <= h and width <= w:
                top, left = generator.integers(0, h - height + 1), generator.integers(0, w - width + 1)
                new = {(int(top) + y, int(left) + x) for y in range(height) for x in range(width)} - masked
                if 1 <= len(new) <= missing:
                    masked |= new
                    break
            if attempt == 10:
                return masked
    return masked


@pytest.mark.parametrize(("h", "w"), GRIDS)
def test_blocks(h: int, w: int) -> None:
    for seed in range(40):
        wanted = 1 + seed * h * w // 80
        mask_hw = blocks(np.random.default_rng(seed), (h, w), wanted=wanted)
        expected = slow_blocks(np.random.default_rng(seed), h, w, wanted)
        assert {(int(y), int(x)) for y, x in zip(*mask_hw.nonzero(), strict=True)} == expected
        assert 1 <= mask_hw.sum() <= wanted


def test_blocks_have_nearly_the_requested_number_of_patches() -> None:
    """And lie together: a masked patch has more masked neighbors than one drawn by itself, whose share is 0.3."""
    masks = [blocks(np.random.default_rng(seed), (14, 14), wanted=59) for seed in range(200)]
    assert np.mean([mask.sum() for mask in masks]) > 0.95 * 59
    together = np.mean([(mask[:, 1:] & mask[:, :-1]).sum() / mask[:, :-1].sum() for mask in masks])
    assert together > 0.6


def test_numbers_of_masked_crops_and_patches() -> None:
    """Binomial and uniform: five standard deviations of the means of 2000 crops."""
    masks = draw_masks(np.random.default_rng(0), 2000, (14, 14), probability=0.5, share=[0.1, 0.5])
    shares = masks.reshape(2000, -1).mean(axis=1)
    masked = shares[shares > 0]
    assert len(masked) / 2000 == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(2000))
    assert masked.min() >= 0.06
    assert masked.max() <= 0.5
    assert masked.mean() == pytest.approx(0.3, abs=0.02)
    assert masks.any(axis=0).all(), "every place at times"


@pytest.mark.parametrize(("probability", "masked"), [(0.0, 0), (1.0, 64)])
def test_all_or_none(probability: float, masked: int) -> None:
    masks = draw_masks(np.random.default_rng(0), 64, (4, 4), probability=probability, share=[0.01, 0.02])
    assert masks.any(axis=(1, 2)).sum() == masked
    assert masks.sum() == masked, "at least one patch, however small the share"


def test_masks_depend_on_the_generator_only() -> None:
    def drawn(seed: list[int]) -> np.ndarray:
        return draw_masks(np.random.default_rng(seed), 8, (6, 6), probability=0.5, share=[0.1, 0.5])

    assert (drawn([0, 1, 2, 3]) == drawn([0, 1, 2, 3])).all()
    assert (drawn([0, 1, 2, 3]) != drawn([0, 1, 2, 4])).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_positions_and_weights(dtype: torch.dtype) -> None:
    """Patch by patch; a crop without a mask has no row but counts in the mean."""
    mask_Shw = draw_masks(np.random.default_rng(3), 7, (4, 5), probability=0.6, share=[0.1, 0.5])
    assert 0 < mask_Shw.any(axis=(1, 2)).sum() < 7
    masks = Masks.of(mask_Shw, like=torch.zeros(1, dtype=dtype))
    places, weights = [], []
    for s in range(7):
        for y in range(4):
            for x in range(5):
                if mask_Shw[s, y, x]:
                    places.append(s * 20 + y * 5 + x)
                    weights.append(1 / (7 * mask_Shw[s].sum()))
    assert masks.positions.tolist() == places
    assert masks.weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(masks.weights.double(), torch.tensor(weights, dtype=torch.float64), rtol=1e-7, atol=0)
    assert torch.equal(masks.hidden, torch.from_numpy(mask_Shw))
    assert len(masks) == len(places)


def test_no_mask_at_all() -> None:
    masks = Masks.of(np.zeros((3, 2, 2), dtype=np.bool_), like=torch.zeros(1))
    assert len(masks) == 0
    assert masks.positions.dtype == torch.int64
    assert masks.weights.shape == (0,)
