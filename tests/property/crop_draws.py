"""Hypothesis strategies for crops: images and settings of all sizes that the configuration allows."""

import dataclasses

import numpy as np
from crop_cases import RAW
from hypothesis import strategies as st
from PIL import Image

from dino_lightning.config import CropsConfig


def pairs(low: float, high: float, *, open_below: bool = False) -> st.SearchStrategy[list[float]]:
    """Two numbers in increasing order, often equal."""
    number = st.floats(low, high, exclude_min=open_below, allow_subnormal=False)
    return st.one_of(st.tuples(number, number).map(sorted), number.map(lambda value: [value, value]))


SIDES = st.one_of(st.integers(1, 5000), st.integers(1, 12), st.sampled_from([1, 224, 5000]))
SCALES = st.one_of(pairs(0, 1, open_below=True), pairs(0.05, 1))
RATIOS_LISTED = st.one_of(pairs(0.001, 1000), pairs(0.5, 2), st.just([3 / 4, 4 / 3]))
SEEDS = st.integers(0, 2**63 - 1)


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def configs(*, geometric_only: bool) -> st.SearchStrategy[CropsConfig]:
    """Small crops with all valid settings; with `geometric_only`, crops are only cut, flipped and resized."""
    probability = st.just(0.0) if geometric_only else st.sampled_from([0.0, 0.5, 1.0])
    return st.builds(
        lambda **drawn: dataclasses.replace(RAW, **drawn),
        global_size=st.integers(1, 20),
        local_size=st.integers(1, 12),
        local_count=st.integers(0, 2),
        global_scale=SCALES,
        local_scale=SCALES,
        ratio=RATIOS_LISTED,
        flip_p=st.sampled_from([0.0, 0.5, 1.0]),
        jitter_p=probability,
        grayscale_p=probability,
        blur_p=st.lists(probability, min_size=3, max_size=3),
        solarize_p=st.lists(probability, min_size=3, max_size=3),
        blur_radius=pairs(0.01, 30),
        brightness=st.sampled_from([0.0, 0.4, 1000.0]),
        contrast=st.sampled_from([0.0, 0.4, 1000.0]),
        saturation=st.sampled_from([0.0, 0.2, 1000.0]),
        hue=st.sampled_from([0.0, 0.1, 0.5]),
        solarize_threshold=st.integers(0, 256),
    )
