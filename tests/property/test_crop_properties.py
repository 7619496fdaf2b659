"""Boxes and cuts of crops for images and settings of any size, compared with slow reference implementations."""

import itertools
import math
from typing import Any

import numpy as np
import torch
from crop_cases import crop_of, pixels
from crop_draws import RATIOS_LISTED, SCALES, SEEDS, SIDES, random_image
from hypothesis import assume, given
from hypothesis import strategies as st
from interpolation import interpolated
from PIL import Image
from profiles import check, examples
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from dino_lightning.config import CropsConfig
from dino_lightning.config.constraints import ranges_of
from dino_lightning.data.crops import pil
from dino_lightning.data.crops.backends import raw_crop
from dino_lightning.data.crops.sampling import CropRNG, FastRNG, ReferenceRNG, random_box

Box = tuple[int, int, int, int]
RANGES = ranges_of(CropsConfig)
GENERATORS = st.tuples(st.sampled_from([ReferenceRNG, FastRNG]), SEEDS).map(lambda pair: pair[0](pair[1]))


# --------------------------------------------------------------------------------------------------------------- boxes


class Tape:
    """A random number generator with given numbers from 0 to 1, which include values at both ends."""

    def __init__(self, numbers: list[float]) -> None:
        self.numbers = itertools.cycle(numbers)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self.numbers)

    def log_uniform(self, low: float, high: float) -> float:
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def integer(self, below: int) -> int:
        return int(next(self.numbers) * below)


TAPES = st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=44).map(lambda n: (Tape(n), Tape(n)))


def fallback(width: int, height: int, ratio: list[float]) -> Box:
    """The largest central box with an allowed aspect ratio."""
    h, w = height, width
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def box_by_definition(width: int, height: int, scale: list[float], ratio: list[float], rng: Any) -> Box:
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = rng.log_uniform(*ratio)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 1 <= w <= width and 1 <= h <= height:
            top = rng.integer(height - h + 1)
            return top, rng.integer(width - w + 1), h, w
    return fallback(width, height, ratio)


def explains(box: Box, width: int, height: int, scale: list[float], ratio: list[float]) -> bool:
    """Whether some area and aspect ratio in the ranges give these sides after rounding."""
    _, _, h, w = box
    wide, high = (w - 0.5, w + 0.5), (h - 0.5, h + 0.5)
    tolerance = 1e-4  # `ReferenceRNG` has float32 numbers
    lowest, highest = (share * width * height for share in scale)
    area_fits = wide[0] * high[0] <= highest * (1 + tolerance) and wide[1] * high[1] >= lowest * (1 - tolerance)
    ratio_fits = wide[0] / high[1] <= ratio[1] * (1 + tolerance) and wide[1] / high[0] >= ratio[0] * (1 - tolerance)
    return area_fits and ratio_fits


@examples(few=100, many=20_000)
def test_a_box_lies_in_the_image_and_in_the_ranges(examples: Any) -> None:
    def holds(width: int, height: int, scale: list[float], ratio: list[float], rng: CropRNG) -> None:
        assert RANGES["global_scale"].contains(scale)
        assert RANGES["ratio"].contains(ratio)
        box = top, left, h, w = random_box(width, height, scale=scale, ratio=ratio, rng=rng)
        assert min(top, left) >= 0
        assert 1 <= h <= height - top
        assert 1 <= w <= width - left
        assert box == fallback(width, height, ratio) or explains(box, width, height, scale, ratio)

    check(holds, given(SIDES, SIDES, SCALES, RATIOS_LISTED, GENERATORS), examples)


@examples(few=100, many=20_000)
def test_a_box_is_that_of_its_definition(examples: Any) -> None:
    def holds(width: int, height: int, scale: list[float], ratio: list[float], tapes: tuple[Any, Any]) -> None:
        ours = random_box(width, height, scale=scale, ratio=ratio, rng=tapes[0])
        assert ours == box_by_definition(width, height, scale, ratio, tapes[1])

    check(holds, given(SIDES, SIDES, SCALES, RATIOS_LISTED, TAPES), examples)


@examples(few=60, many=5000)
def test_a_box_is_torchvision_s(examples: Any) -> None:
    """Also if no box fits, because the ranges are narrow and exclude the image's ratio."""

    def holds(width: int, height: int, scale: list[float], ratio: list[float], seed: int) -> None:
        torch.manual_seed(seed)
        image = torch.empty(1, height, width, device="meta")
        theirs = RandomResizedCrop.get_params(image, scale, ratio)
        assume(min(theirs[2:]) > 0)  # torchvision's fallback may be empty
        ours = random_box(width, height, scale=scale, ratio=ratio, rng=ReferenceRNG(seed))
        assert ours == theirs
        if not explains(ours, width, height, scale, ratio):
            assert ours == fallback(width, height, ratio)

    check(holds, given(SIDES, SIDES, SCALES, RATIOS_LISTED, SEEDS), examples)


# ------------------------------------------------------------------------------------------------------------ the cut


@st.composite
def boxes(draw: st.DrawFn, max_side: int = 40) -> tuple[int, int, Box]:
    """Width and height of an image, and a box inside it."""
    width, height = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    h, w = draw(st.integers(1, height)), draw(st.integers(1, width))
    return width, height, (draw(st.integers(0, height - h)), draw(st.integers(0, width - w)), h, w)


def by_pil(image: Image.Image, box: Box, size: int, *, flip: bool = False) -> Tensor:
    return pixels(pil.apply(crop_of(size, box=box, flip=flip), image, threshold=128))


@examples(few=25, many=600)
def test_a_cut_is_the_reference_interpolation(examples: Any) -> None:
    def holds(image: tuple[int, int, Box], size: int, seed: int) -> None:
        width, height, box = image
        top, left, h, w = box
        picture = random_image(width, height, seed)
        inside = pixels(picture)[:, top : top + h, left : left + w]
        by_rows, by_columns = (interpolated(inside, size, size, rows_first=first) for first in (True, False))
        ours = raw_crop(pixels(picture), crop_of(size, box=box))
        assert tuple(ours.shape) == (3, size, size)
        assert (ours - by_rows).abs().max() <= 2  # each axis is rounded
        # Pillow 13 resizes the cheaper axis first; earlier versions resize the rows first.
        difference = by_pil(picture, box, size) - torch.stack([by_rows, by_columns])
        assert difference.abs().amax((1, 2, 3)).min() <= 2

    check(holds, given(boxes(), st.integers(1, 16), st.integers(0, 99)), examples)


@examples(few=100, many=3000)
def test_pixels_outside_the_box_do_not_matter(examples: Any) -> None:
    def holds(image: tuple[int, int, Box], size: int, seed: int) -> None:
        width, height, box = image
        top, left, h, w = box
        first, other = (np.asarray(random_image(width, height, number)).copy() for number in (seed, seed + 1))
        other[top : top + h, left : left + w] = first[top : top + h, left : left + w]
        a, b = Image.fromarray(first), Image.fromarray(other)
        crop = crop_of(size, box=box)
        assert torch.equal(raw_crop(pixels(a), crop), raw_crop(pixels(b), crop))
        assert torch.equal(by_pil(a, box, size), by_pil(b, box, size))

    check(holds, given(boxes(), st.integers(1, 24), st.integers(0, 99)), examples)


@examples(few=60, many=1500)
def test_a_flip_is_the_mirrored_crop(examples: Any) -> None:
    """The flip of a flipped crop is the crop, and equals the crop of the mirrored image at the mirrored position."""

    def holds(image: tuple[int, int, Box], size: int, seed: int) -> None:
        width, height, box = image
        top, left, h, w = box
        picture = random_image(width, height, seed)
        mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        unflipped, flipped = (by_pil(picture, box, size, flip=flip) for flip in (False, True))
        assert torch.equal(flipped.flip(-1), unflipped)
        mirrored_box = (top, width - left - w, h, w)
        assert (by_pil(mirrored, mirrored_box, size, flip=True).int() - unflipped.int()).abs().max() <= 1
        ours = raw_crop(pixels(picture), crop_of(size, box=box))
        theirs = raw_crop(pixels(mirrored), crop_of(size, box=mirrored_box))
        assert (ours.int() - theirs.flip(-1).int()).abs().max() <= 1

    check(holds, given(boxes(), st.integers(1, 24), st.integers(0, 99)), examples)
