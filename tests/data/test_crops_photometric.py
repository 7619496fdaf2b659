"""The operators on tensors: against PIL's, against slow loops, and one crop at a time."""

import colorsys
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crop_cases import RAW, crop_of, noise, photographs, pixels, smooth, with_pil, with_tensors
from PIL import Image
from torch import Tensor

from dino_lightning.config import CropsConfig
from dino_lightning.data.crops.sampling import (
    BRIGHTNESS,
    CONTRAST,
    GLOBAL_2,
    HUE,
    LOCAL,
    SATURATION,
    Crop,
    FastRNG,
    sample_crop,
)

ORDERS = list(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))
STRENGTHS = (0.6, 0.75, 0.9, 1.1, 1.25, 1.4)


def _one(part: int, *factors: float) -> list[dict[str, Any]]:
    return [{"jitter": ((part, factor),)} for factor in factors]


# ------------------------------------------------------------------------------------------------- against PIL

SAME_AS_PIL: dict[str, tuple[float, float, list[dict[str, Any]]]] = {
    "flip": (0, 0, [{"flip": True}]),
    "gray": (0.51, 0.26, [{"gray": True}]),
    "brightness": (1.01, 0.5, _one(BRIGHTNESS, *STRENGTHS)),
    "contrast": (1.2, 0.5, _one(CONTRAST, *STRENGTHS)),
    "saturation": (1.2, 0.5, _one(SATURATION, 0.8, 0.9, 1.1, 1.2)),
    "hue": (16.5, 1.4, _one(HUE, -0.1, -0.06, -0.02, 0.02, 0.06, 0.1)),
    "strong hue": (17, 1.8, _one(HUE, -0.5, -0.3, 0.3, 0.5)),
    "blur": (3.3, 1.15, [{"blur": sigma} for sigma in (0.1, 0.3, 0.5, 0.9, 1.1, 1.5, 2.0, 3.0)]),
    "all orders": (
        17,
        2.2,
        [
            {"jitter": tuple((part, (f, 2 - f, (f + 1) / 2, (f - 1) / 4)[part]) for part in order)}
            for order in ORDERS
            for f in (0.7, 1.3)
        ],
    ),
}
"""Largest difference of a pixel and largest mean difference of a crop (1/255), and parameters that are tried.

PIL makes whole numbers after every operator: it rounds gray, truncates blends, and keeps hue and saturation in 256
steps, by which a colorful pixel moves by up to 15. Its blur rounds after each of six passes.
"""
PHOTOGRAPHS_HUE = (10, 0.5)
"""The same for the hue of photographs, where few colors are as strong as in noise."""


def _compare(name: str, image: Image.Image, *, largest: float, mean: float) -> None:
    crops = [crop_of(image.width, **changes) for changes in SAME_AS_PIL[name][2]]
    ours = with_tensors(crops, pixels(image).expand(len(crops), -1, -1, -1))
    difference = (ours - with_pil(crops, [image] * len(crops))).abs()
    assert difference.max() <= largest + 1e-4
    assert difference.mean((1, 2, 3)).max() <= mean + 1e-4


@pytest.mark.parametrize("size", [224, 96])
@pytest.mark.parametrize("name", SAME_AS_PIL)
def test_operators_equal_pil(name: str, size: int) -> None:
    largest, mean, _ = SAME_AS_PIL[name]
    for image in (smooth(size, size), noise(size, size)):
        _compare(name, image, largest=largest, mean=mean)


@pytest.mark.parametrize("name", SAME_AS_PIL)
def test_operators_equal_pil_on_photographs(name: str, shared_data: Path) -> None:
    largest, mean = PHOTOGRAPHS_HUE if "hue" in name else SAME_AS_PIL[name][:2]
    for photograph in photographs(shared_data)[:2]:
        _compare(name, photograph.resize((96, 96), Image.Resampling.BICUBIC), largest=largest, mean=mean)


@pytest.mark.parametrize("threshold", [0, 1, 100, 128, 255, 256])
def test_solarization_is_exactly_that_of_pil(threshold: int) -> None:
    """Of every value, with a threshold of 0 as of 256."""
    values = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    crops = [crop_of(16, solarize=True)]
    ours = with_tensors(crops, pixels(values)[None], dataclasses.replace(RAW, solarize_threshold=threshold))
    torch.testing.assert_close(ours, with_pil(crops, [values], threshold=threshold), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------ against slow loops


def _luma(pixel: list[float]) -> float:
    return 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]


def _slow_part(pixels: list[list[float]], part: int, factor: float) -> Iterator[list[float]]:
    """One part of the jitter, pixel by pixel."""
    mean = round(sum(map(_luma, pixels)) / len(pixels))
    for pixel in pixels:
        if part == HUE:
            hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in pixel))
            yield [255 * channel for channel in colorsys.hsv_to_rgb((hue + factor) % 1, saturation, value)]
        else:
            other = {BRIGHTNESS: 0.0, CONTRAST: mean, SATURATION: _luma(pixel)}[part]
            yield [min(255.0, max(0.0, factor * channel + (1 - factor) * other)) for channel in pixel]


def _slow(crop: Crop, image_CSS: Tensor) -> Tensor:
    """A crop without blur, pixel by pixel in double precision, values from 0 to 255."""
    turned = image_CSS.flip(-1) if crop.flip else image_CSS
    pixels = turned.flatten(1).T.double().tolist()
    for part, factor in crop.jitter:
        pixels = list(_slow_part(pixels, part, factor))
    if crop.gray:
        pixels = [[_luma(pixel)] * 3 for pixel in pixels]
    if crop.solarize:  # What rounds to 128 counts as 128.
        pixels = [[255 - channel if channel >= 127.5 else channel for channel in pixel] for pixel in pixels]
    return torch.tensor(pixels).T.reshape(image_CSS.shape).float()


def _special_colors() -> Tensor:
    """Grays, pure and mixed colors, where two channels are equal, and noise (3, 8, 8)."""
    corners = torch.tensor(list(itertools.product((0, 128, 255), repeat=3)), dtype=torch.uint8)
    near = torch.tensor([(255, 0, 1), (255, 1, 0), (0, 255, 1), (1, 255, 0), (0, 1, 255), (1, 0, 255), (7, 7, 8)])
    rest = torch.randint(0, 256, (64 - len(corners) - len(near), 3), generator=torch.Generator().manual_seed(0))
    return torch.cat([corners, near.byte(), rest.byte()]).T.reshape(3, 8, 8).contiguous()


def _check_slowly(crops: list[Crop], *, atol: float) -> None:
    image = _special_colors()
    ours = with_tensors(crops, image.expand(len(crops), -1, -1, -1))
    torch.testing.assert_close(ours, torch.stack([_slow(crop, image) for crop in crops]), rtol=0, atol=atol)


def test_hue_turns_as_in_colorsys() -> None:
    """Also the largest turns that may be configured, half a circle."""
    turns = [-0.5, -0.4, -1 / 3, -0.2, -1 / 6, -0.1, -0.01, 1e-4, 0.05, 0.1, 1 / 6, 0.25, 0.34, 0.45, 0.5]
    _check_slowly([crop_of(8, jitter=((HUE, turn),)) for turn in turns], atol=1e-3)


@pytest.mark.parametrize("part", [BRIGHTNESS, CONTRAST, SATURATION])
def test_blends_follow_their_formula(part: int) -> None:
    """Also where all of the image goes, or the factor is far above the usual ones."""
    _check_slowly([crop_of(8, jitter=((part, factor),)) for factor in (0.0, 0.6, 1.0, 1.4, 3.0)], atol=1e-3)


def test_every_order_and_choice_of_the_jitter() -> None:
    """The four parts, three, two or one of them, in each order: all in one batch."""
    factors = {BRIGHTNESS: 1.35, CONTRAST: 0.65, SATURATION: 1.2, HUE: -0.09}
    orders = [order for count in range(5) for order in itertools.permutations(factors, count)]
    assert len(orders) == 65
    _check_slowly([crop_of(8, jitter=tuple((part, factors[part]) for part in order)) for order in orders], atol=2e-2)


def _drawn(count: int, *, size: int, view: int = GLOBAL_2, **changes: Any) -> list[Crop]:
    """Random crops that are already cut: they have the size of their picture."""
    config = dataclasses.replace(CropsConfig(global_size=size, local_size=size), **changes)
    crops = (sample_crop(config, view, width=size, height=size, rng=FastRNG(seed)) for seed in range(count))
    return [dataclasses.replace(crop, box=(0, 0, size, size)) for crop in crops]


def test_random_crops_follow_the_slow_loop() -> None:
    crops = _drawn(60, size=8, blur_p=[0.0] * 3, solarize_p=[0.5] * 3)
    assert any(crop.solarize and crop.jitter and crop.gray and crop.flip for crop in crops)
    _check_slowly(crops, atol=2e-2)


def test_channels_are_normalized_by_their_statistics() -> None:
    image = _special_colors()
    ours = with_tensors([crop_of(8)], image[None], CropsConfig())[0]
    for channel, (mean, std) in enumerate(zip(CropsConfig().mean, CropsConfig().std, strict=True)):
        expected = (image[channel].double() / 255 - mean) / std
        torch.testing.assert_close(ours[channel].double(), expected, rtol=0, atol=1e-5)


def test_images_of_four_channels_are_brightened_and_blended_with_their_mean() -> None:
    image = torch.randint(0, 256, (4, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    config = dataclasses.replace(RAW, mean=[0.0] * 4, std=[1 / 255] * 4)
    crops = [crop_of(8, jitter=jitter) for jitter in (((BRIGHTNESS, 0.7),), ((CONTRAST, 1.3),))]
    brighter, contrasted = with_tensors(crops, image.expand(2, -1, -1, -1), config)
    torch.testing.assert_close(brighter, 0.7 * image, rtol=0, atol=1e-3)
    expected = (1.3 * image - 0.3 * image.double().mean().round()).clamp(0, 255).float()
    torch.testing.assert_close(contrasted, expected, rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------------------------ whole batches


def _noise_batch(count: int, size: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(1)).byte()


def _check_one_by_one(crops: list[Crop]) -> Tensor:
    batch = _noise_batch(len(crops), crops[0].size)
    together = with_tensors(crops, batch)
    for i, crop in enumerate(crops):
        torch.testing.assert_close(with_tensors([crop], batch[i : i + 1])[0], together[i], rtol=0, atol=2e-3)
    return together


@pytest.mark.parametrize("view", [GLOBAL_2, LOCAL])
@pytest.mark.parametrize("count", [1, 2, 17, 40])
def test_a_batch_equals_its_single_crops(count: int, view: int) -> None:
    """Whatever its grouping: hues before and after blends, radii of blur, and crops that nothing happens to."""
    _check_one_by_one(_drawn(count, size=24, view=view, blur_p=[0.5] * 3))


FIELDS = ("flip_p", "jitter_p", "grayscale_p", "blur_p", "solarize_p")


@pytest.mark.parametrize("others", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("field", FIELDS)
def test_batches_in_which_all_or_none_are_changed(field: str, p: float, others: float) -> None:
    """No crop has the operator or all have it, while none, some or all have the others."""
    probabilities = {**dict.fromkeys(FIELDS, others), field: p}
    values: dict[str, Any] = {
        name: [p] * 3 if name in ("blur_p", "solarize_p") else p for name, p in probabilities.items()
    }
    crops = _drawn(6, size=24, **values)
    together = _check_one_by_one(crops)
    if field == "flip_p" and p == others == 0.0:
        torch.testing.assert_close(together, _noise_batch(6, 24).float(), rtol=0, atol=1e-4)


def test_the_order_of_a_batch_is_kept() -> None:
    crops, batch = _drawn(20, size=24), _noise_batch(20, 24)
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    ours = with_tensors([crops[i] for i in shuffled], batch[shuffled])
    torch.testing.assert_close(ours, with_tensors(crops, batch)[shuffled], rtol=0, atol=1e-3)
