"""The random parameters of crops: those of torchvision, and the fast rng's against the original's."""

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare, ks_2samp
from torchvision.transforms import ColorJitter, RandomResizedCrop

from dino_lightning.config import CropsConfig
from dino_lightning.data.crops.sampling import (
    BRIGHTNESS,
    CONTRAST,
    GLOBAL_1,
    GLOBAL_2,
    HUE,
    LOCAL,
    SATURATION,
    Crop,
    CropRNG,
    FastRNG,
    ReferenceRNG,
    random_box,
    sample_crop,
    sample_crops,
    sample_jitter,
)

WIDTH, HEIGHT = 2000, 1500
DRAWS = 3000
UNLIKELY = 1e-3
"""Smallest p-value of two samples of one distribution; the samples are the same in every run."""
NAMES = ("brightness", "contrast", "saturation", "hue")
VIEWS = [GLOBAL_1, GLOBAL_2, LOCAL]
RNGS = [ReferenceRNG, FastRNG]


@cache
def _sample(rng: type, view: int) -> list[Crop]:
    """One crop per seed; no seed comes twice, so that the samples are independent."""
    first = DRAWS * (2 * view + RNGS.index(rng))
    return [
        sample_crop(CropsConfig(), view, width=WIDTH, height=HEIGHT, rng=rng(first + number)) for number in range(DRAWS)
    ]


CONTINUOUS: dict[str, Callable[[Crop], float | None]] = {
    "area": lambda crop: crop.box[2] * crop.box[3] / (WIDTH * HEIGHT),
    "log ratio": lambda crop: math.log(crop.box[3] / crop.box[2]),
    "top": lambda crop: crop.box[0] / (HEIGHT - crop.box[2]) if crop.box[2] < HEIGHT else None,
    "left": lambda crop: crop.box[1] / (WIDTH - crop.box[3]) if crop.box[3] < WIDTH else None,
    "brightness": lambda crop: dict(crop.jitter).get(BRIGHTNESS),
    "contrast": lambda crop: dict(crop.jitter).get(CONTRAST),
    "saturation": lambda crop: dict(crop.jitter).get(SATURATION),
    "hue": lambda crop: dict(crop.jitter).get(HUE),
    "blur": lambda crop: crop.blur or None,
}
"""`None` for crops that have no such parameter."""
DISCRETE: dict[str, Callable[[Crop], bool]] = {
    "flip": lambda crop: crop.flip,
    "jitter": lambda crop: bool(crop.jitter),
    "gray": lambda crop: crop.gray,
    "blur": lambda crop: bool(crop.blur),
    "solarize": lambda crop: crop.solarize,
}


def _values(crops: list[Crop], parameter: Callable[[Crop], float | None]) -> list[float]:
    return [value for crop in crops if (value := parameter(crop)) is not None]


def _pvalue_of_counts(*samples: list) -> float:
    """Of samples of one discrete distribution; 1 where only one value was ever seen."""
    counts = [Counter(sample) for sample in samples]
    kinds = sorted(set().union(*counts))
    if len(kinds) == 1:
        return 1.0
    return chi2_contingency([[count[kind] for kind in kinds] for count in counts]).pvalue  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------ the fast rng against the original's


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("parameter", CONTINUOUS)
@pytest.mark.slow_after_first(12)
def test_fast_rng_has_the_distributions_of_the_reference(parameter: str, view: int) -> None:
    original, fast = (_values(_sample(rng, view), CONTINUOUS[parameter]) for rng in RNGS)
    assert min(len(original), len(fast)) > 200
    assert ks_2samp(original, fast).pvalue > UNLIKELY  # type: ignore[attr-defined]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("parameter", DISCRETE)
def test_fast_rng_has_the_probabilities(parameter: str, view: int) -> None:
    assert _pvalue_of_counts(*([DISCRETE[parameter](crop) for crop in _sample(rng, view)] for rng in RNGS)) > UNLIKELY


def test_every_order_of_the_jitter_is_equally_likely() -> None:
    orders = [
        [tuple(part for part, _ in crop.jitter) for view in VIEWS for crop in _sample(rng, view) if crop.jitter]
        for rng in RNGS
    ]
    assert _pvalue_of_counts(*orders) > UNLIKELY
    for sample in orders:
        counts = Counter(sample)
        assert len(counts) == 24
        assert chisquare(list(counts.values())).pvalue > UNLIKELY


@pytest.mark.parametrize("rng", RNGS)
def test_positions_reach_both_ends(rng: type[CropRNG]) -> None:
    """In small images a position off by one is seen."""
    generator = rng(0)  # type: ignore[call-arg]
    counts = Counter(generator.integer(3) for _ in range(3000))
    assert sorted(counts) == [0, 1, 2]
    assert chisquare(list(counts.values())).pvalue > UNLIKELY
    boxes = [random_box(8, 6, scale=[0.2, 0.4], ratio=[3 / 4, 4 / 3], rng=generator) for _ in range(1000)]
    assert {top + height for top, _, height, _ in boxes if top} >= {4, 5, 6}
    assert {left + width for _, left, _, width in boxes} == {3, 4, 5, 6, 7, 8}
    assert min(top for top, *_ in boxes) == min(left for _, left, *_ in boxes) == 0


def test_parameters_of_fast_rng_are_independent() -> None:
    """Of one another, and of those of the image with the next seed: correlations within 5 standard deviations."""
    config = dataclasses.replace(CropsConfig(), jitter_p=1.0, blur_p=[1.0] * 3, solarize_p=[0.5] * 3)
    rows = []
    for seed in range(DRAWS):
        crop = sample_crop(config, LOCAL, width=WIDTH, height=HEIGHT, rng=FastRNG(seed))
        drawn = (parameter(crop) for parameter in (*CONTINUOUS.values(), *DISCRETE.values()))
        place = [part for part, _ in crop.jitter].index(HUE)
        rows.append([*(0.0 if value is None else float(value) for value in drawn), float(place)])
    table = np.array(rows)
    table = table[:, table.std(0) > 0]
    assert table.shape[1] == len(CONTINUOUS) + 4  # flip, gray, solarise and the place of the hue; the rest is certain
    both = np.corrcoef(np.hstack([table[:-1], table[1:]]), rowvar=False)
    assert np.abs(both - np.eye(len(both))).max() < 5 / math.sqrt(DRAWS)


# ----------------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("size", [(2000, 1500), (1000, 10), (10, 1000), (40, 30), (7, 5), (1, 1), (3, 500)])
@pytest.mark.parametrize("scale", [[0.4, 1.0], [0.05, 0.4]])
def test_boxes_equal_torchvision(size: tuple[int, int], scale: list[float]) -> None:
    ratio, image = [3 / 4, 4 / 3], torch.empty(3, size[1], size[0])
    for seed in range(20):
        torch.manual_seed(seed)
        theirs = RandomResizedCrop.get_params(image, scale, ratio)
        assert random_box(*size, scale=scale, ratio=ratio, rng=ReferenceRNG(seed)) == tuple(theirs)


@pytest.mark.parametrize("rng", RNGS)
@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (40, 30), (1, 1), (2, 3), (3, 500)])
def test_boxes_lie_in_the_image(size: tuple[int, int], rng: type) -> None:
    width, height = size
    for seed in range(50):
        for view in (GLOBAL_1, LOCAL):
            top, left, h, w = sample_crop(CropsConfig(), view, width=width, height=height, rng=rng(seed)).box
            assert 0 <= top <= top + h <= height
            assert 0 <= left <= left + w <= width
            assert min(h, w) >= 1


@pytest.mark.parametrize("rng", RNGS)
def test_long_images_give_the_largest_central_box(rng: type) -> None:
    """Nothing of 40 % of the area fits within the ratios: 10 pixels by 4/3, and by 3/4, of them."""
    global_box = {"scale": [0.4, 1.0], "ratio": [3 / 4, 4 / 3]}
    assert random_box(1000, 10, **global_box, rng=rng(0)) == (0, 493, 10, 13)
    assert random_box(10, 1000, **global_box, rng=rng(0)) == (493, 0, 13, 10)
    # Too small an area for a whole pixel, in an image whose ratio is fine: all of it.
    assert random_box(4, 4, scale=[1e-4, 1e-3], ratio=[3 / 4, 4 / 3], rng=rng(0)) == (0, 0, 4, 4)


# ----------------------------------------------------------------------------------------------- jitter and seeds


@pytest.mark.parametrize(
    "off", [(), ("brightness",), ("contrast", "hue"), ("saturation", "hue"), ("brightness", "contrast", "saturation")]
)
def test_jitter_equals_torchvision(off: tuple[str, ...]) -> None:
    """A part of strength 0 draws no number."""
    config = dataclasses.replace(CropsConfig(), **dict.fromkeys(off, 0.0))
    theirs = ColorJitter(*(getattr(config, name) for name in NAMES))
    for seed in range(30):
        torch.manual_seed(seed)
        order, *factors = theirs.get_params(*(getattr(theirs, name) for name in NAMES))
        expected = [(part, factors[part]) for part in order.tolist() if factors[part] is not None]
        assert sample_jitter(config, rng=ReferenceRNG(seed)) == tuple(expected)


def test_strong_jitter_does_not_turn_negative() -> None:
    config = dataclasses.replace(CropsConfig(), brightness=3.0)
    factors = [dict(sample_jitter(config, rng=FastRNG(seed)))[BRIGHTNESS] for seed in range(200)]
    assert 0 <= min(factors) < 0.2
    assert 3.8 < max(factors) <= 4


@pytest.mark.parametrize("rng", RNGS)
@pytest.mark.parametrize("local_count", [0, 8])
def test_equal_seeds_give_equal_crops(local_count: int, rng: type) -> None:
    config = dataclasses.replace(CropsConfig(), local_count=local_count)

    def drawn(seed: int) -> list[Crop]:
        return sample_crops(config, width=WIDTH, height=HEIGHT, rng=rng(seed))

    assert drawn(5) == drawn(5)
    assert len(drawn(5)) == 2 + local_count
    # The position alone has millions of values.
    assert len({crop.box for seed in range(100) for crop in drawn(seed)}) == 100 * (2 + local_count)


@pytest.mark.parametrize("rng", RNGS)
def test_sampling_does_not_change_global_random_states(rng: type) -> None:
    before = random.getstate(), torch.get_rng_state()
    sample_crops(CropsConfig(), width=WIDTH, height=HEIGHT, rng=rng(0))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_view_without_solarization_draws_no_number() -> None:
    """Its first global view has no such operator: the second one starts with the same number of Python's stream."""
    without, never = (dataclasses.replace(CropsConfig(), solarize_p=[p, 0.2, 0.0]) for p in (0.0, 1e-9))
    seconds = [
        [sample_crops(config, width=WIDTH, height=HEIGHT, rng=ReferenceRNG(seed))[1].blur for seed in range(50)]
        for config in (without, never)
    ]
    assert seconds[0] != seconds[1]


@pytest.mark.parametrize(("size", "ratio"), [((1, 1), [3.0, 4.0]), ((1, 9), [5.0, 5.0]), ((9, 1), [0.01, 0.02])])
def test_a_box_is_never_empty(size: tuple[int, int], ratio: list[float]) -> None:
    """torchvision's fallback has no pixels here."""
    for rng in RNGS:
        _, _, h, w = random_box(*size, scale=[1.0, 1.0], ratio=ratio, rng=rng(0))
        assert (h, w) == (1, 1)
