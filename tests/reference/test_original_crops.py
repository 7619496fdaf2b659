"""`crops=pil` against the original's augmentation, as the benchmark rebuilds it."""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crop_cases import picture
from original_crops import Blur, OriginalCrops, Solarize
from original_crops import view as original_view
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from dino_lightning.config import CropsConfig
from dino_lightning.data.crops import EvalView, denormalize, pil
from dino_lightning.data.crops.sampling import GLOBAL_1, GLOBAL_2, LOCAL, Crop, ReferenceRNG, sample_crop

SMALL = CropsConfig(global_size=24, local_size=12, local_count=3, eval_resize=32, eval_size=24)
VIEWS = [GLOBAL_1, GLOBAL_2, LOCAL]
Transform = Callable[[Image.Image], Image.Image]


def _after_seeding(transform: Callable[[Image.Image], Any], image: Image.Image, seed: int) -> Any:
    torch.manual_seed(seed)
    random.seed(seed)
    return transform(image)


def _view(config: CropsConfig, view: int, image: Image.Image, rng: ReferenceRNG) -> Tensor:
    """One view of an image, finished."""
    crop = sample_crop(config, view, width=image.width, height=image.height, rng=rng)
    return pil.Normalized(config)(pil.apply(crop, image, threshold=config.solarize_threshold))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (90, 400)])
def test_bit_for_bit_the_original(size: tuple[int, int]) -> None:
    for seed in range(4):
        image = picture(*size, seed=seed)
        ours = pil.PILCrops(CropsConfig())(image, seed=seed)
        theirs = _after_seeding(OriginalCrops([]).crops, image, seed)
        assert len(ours) == len(theirs) == 10
        differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not torch.equal(a, b)]
        assert not differing, f"seed {seed}: crops {differing} differ"


@pytest.mark.parametrize("view", VIEWS)
def test_each_view_is_bit_for_bit_the_original(view: int) -> None:
    size, scale = (96, (0.05, 0.4)) if view == LOCAL else (224, (0.4, 1.0))
    after = {GLOBAL_1: [Blur(1.0)], GLOBAL_2: [Blur(0.1), Solarize(0.2)], LOCAL: [Blur(0.5)]}[view]
    theirs = original_view(size, scale, *after)
    for seed in range(20):
        image = picture(160, 120, seed=seed)
        ours = _view(CropsConfig(), view, image, ReferenceRNG(seed))
        assert torch.equal(ours, _after_seeding(theirs, image, seed)), f"seed {seed}"


def test_real_photographs_bit_for_bit(shared_data: Path) -> None:
    photographs = sorted((shared_data / "voc_labelme3" / "JPEGImages").glob("*.jpg"))
    assert photographs
    for seed, path in enumerate(photographs[:2]):
        image = Image.open(path).convert("RGB")
        ours = pil.PILCrops(CropsConfig())(image, seed=seed)
        theirs = _after_seeding(OriginalCrops([]).crops, image, seed)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), path.name


def test_crops_and_global_random_states_are_independent() -> None:
    crops, image = pil.PILCrops(SMALL), picture()
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tobytes()  # type: ignore[union-attr]
    first = crops(image, seed=3)
    after = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tobytes()  # type: ignore[union-attr]
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])
    assert before[2] == after[2]
    random.seed(99)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, crops(image, seed=3), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, crops(image, seed=4), strict=True))


# --------------------------------------------------------------------------------------------------- probabilities


def _calm(**changes: Any) -> CropsConfig:
    """Every operator off and the crop the whole image, but for `changes`."""
    calm = CropsConfig(
        global_size=8,
        local_size=8,
        global_scale=[1.0, 1.0],
        local_scale=[1.0, 1.0],
        ratio=[1.0, 1.0],
        local_count=1,
        flip_p=0.0,
        jitter_p=0.0,
        grayscale_p=0.0,
        blur_p=[0.0] * 3,
        blur_radius=[1.0, 2.0],
        solarize_p=[0.0] * 3,
        mean=[0.0] * 3,
        std=[1.0] * 3,
    )
    return dataclasses.replace(calm, **changes)


def _changes(view: int, *, draws: int, **changes: Any) -> int:
    """How many of `draws` views of one picture differ from it; equal crops are applied once."""
    image, config, rng = picture(8, 8), _calm(**changes), ReferenceRNG(0)
    changed: dict[Crop, bool] = {}
    count = 0
    for _ in range(draws):
        crop = sample_crop(config, view, width=8, height=8, rng=rng)
        if crop not in changed:
            changed[crop] = pil.apply(crop, image, threshold=128).tobytes() != image.tobytes()
        count += changed[crop]
    return count


@pytest.mark.parametrize(
    ("field", "view"),
    [
        ("flip_p", LOCAL),
        ("jitter_p", GLOBAL_1),
        ("grayscale_p", GLOBAL_2),
        *itertools.product(("blur_p", "solarize_p"), VIEWS),  # the probabilities that depend on the view
    ],
)
@pytest.mark.slow_after_first(2)
def test_operators_are_applied_with_their_probability(field: str, view: int) -> None:
    """Counts of the defaults are within 4 standard deviations of the binomial distribution."""
    default = getattr(CropsConfig(), field)
    p = default[view] if isinstance(default, list) else default
    count = _changes(view, draws=2000, **{field: default})
    assert abs(count - p * 2000) <= 4 * math.sqrt(p * (1 - p) * 2000)


def test_the_defaults_are_the_published_ones() -> None:
    config = CropsConfig()
    assert config.backend == "pil"
    assert config.blur_p == [1.0, 0.1, 0.5]
    assert config.blur_radius == [0.1, 2.0]
    assert config.solarize_p == [0.0, 0.2, 0.0]
    assert config.solarize_threshold == 128
    assert (config.flip_p, config.jitter_p, config.grayscale_p) == (0.5, 0.8, 0.2)
    assert (config.brightness, config.contrast, config.saturation, config.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (config.global_size, config.global_scale) == (224, [0.4, 1.0])
    assert (config.local_size, config.local_scale, config.local_count) == (96, [0.05, 0.4], 8)


@pytest.mark.parametrize("field", ["flip_p", "jitter_p", "grayscale_p", "blur_p", "solarize_p"])
def test_probabilities_zero_and_one(field: str) -> None:
    for p in (0.0, 1.0):
        value = [p] * 3 if field in ("blur_p", "solarize_p") else p
        for view in VIEWS:
            assert _changes(view, draws=100, **{field: value}) == p * 100


# -------------------------------------------------------------------------------------------------- configured values


@pytest.mark.parametrize("local_count", [0, 1, 5])
def test_numbers_and_sizes_of_crops(local_count: int) -> None:
    config = dataclasses.replace(SMALL, local_count=local_count)
    crops = pil.PILCrops(config)(picture(), seed=0)
    assert [tuple(crop.shape) for crop in crops] == [(3, 24, 24)] * 2 + [(3, 12, 12)] * local_count
    assert all(crop.dtype == torch.float32 for crop in crops)


@pytest.mark.parametrize("view", VIEWS)
def test_scales_and_ratios_of_the_crops(view: int) -> None:
    """The colors of a picture are its coordinates, so a crop shows its corners; areas and ratios fill their ranges."""
    side, size = 128, 64
    yy, xx = np.mgrid[0:side, 0:side]
    image = Image.fromarray(np.stack([xx, yy, np.zeros_like(xx)], -1).astype(np.uint8))
    scales: dict[str, Any] = {"global_scale": [0.3, 0.4], "local_scale": [0.1, 0.2]}
    config = dataclasses.replace(_calm(), global_size=size, local_size=size, ratio=[0.5, 2.0], **scales)
    low, high = scales["local_scale" if view == LOCAL else "global_scale"]
    rng, areas, ratios = ReferenceRNG(0), [], []
    for _ in range(300):
        red, green, _ = _view(config, view, image, rng) * 255
        width, height = ((c.max() - c.min()).item() + 1 for c in (red, green))
        areas.append(width * height / side**2)
        ratios.append(width / height)
    assert min(areas) == pytest.approx(low, abs=0.02)
    assert max(areas) == pytest.approx(high, abs=0.02)
    assert min(ratios) == pytest.approx(0.5, abs=0.05)
    assert max(ratios) == pytest.approx(2.0, abs=0.2)


def test_order_of_the_operators() -> None:
    """Grayscale, blur, solarise, normalize: in any other order the numbers differ."""
    config = _calm(
        global_size=16,
        grayscale_p=1.0,
        blur_p=[1.0] * 3,
        blur_radius=[0.7, 0.7],
        solarize_p=[1.0] * 3,
        solarize_threshold=100,
        mean=[0.5] * 3,
        std=[0.25] * 3,
    )
    image = picture(16, 16)
    steps: dict[str, Transform] = {
        "gray": lambda x: ImageOps.grayscale(x).convert("RGB"),
        "blur": lambda x: x.filter(ImageFilter.GaussianBlur(0.7)),
        "solarize": lambda x: ImageOps.solarize(x, 100),
    }

    def by_hand(order: tuple[str, ...]) -> Tensor:
        x = image
        for name in order:
            x = steps[name](x)
        return (transforms.ToTensor()(x) - 0.5) / 0.25

    ours = _view(config, GLOBAL_2, image, ReferenceRNG(0))
    orders = itertools.permutations(steps)
    assert [order for order in orders if torch.allclose(ours, by_hand(order), atol=1e-5)] == [tuple(steps)]


@pytest.mark.parametrize(
    ("field", "extremes"),
    [("brightness", (0.0, 0.9)), ("contrast", (0.0, 0.9)), ("saturation", (0.0, 0.9)), ("hue", (0.0, 0.5))],
)
def test_strength_of_the_jitter(field: str, extremes: tuple[float, float]) -> None:
    off = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    for strength in extremes:
        count = _changes(GLOBAL_1, draws=100, jitter_p=1.0, **{**off, field: strength})
        assert count == 0 if strength == 0 else count > 90


# --------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_resizes_crops_and_normalizes() -> None:
    image = picture(50, 40)
    resize = transforms.Resize(32, interpolation=InterpolationMode.BICUBIC)
    theirs = transforms.Compose(
        [resize, transforms.CenterCrop(24), transforms.ToTensor(), transforms.Normalize(SMALL.mean, SMALL.std)]
    )
    ours = EvalView(SMALL)(image)
    torch.testing.assert_close(ours, theirs(image), rtol=0, atol=0)
    pixels = transforms.CenterCrop(24)(resize(image))
    torch.testing.assert_close(
        denormalize(ours, config=SMALL), torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("size", [(50, 40), (40, 70), (30, 24)])
def test_evaluation_of_tensors_equals_that_of_pil_images(size: tuple[int, int]) -> None:
    """`crops=cpu` and `device` decode to tensors; their interpolation rounds some values differently."""
    image = picture(*size)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    of_tensor, of_image = (denormalize(EvalView(SMALL)(x), config=SMALL) * 255 for x in (tensor, image))
    assert of_tensor.shape == (3, 24, 24)
    assert of_tensor.dtype == torch.float32
    difference = (of_tensor - of_image).abs()
    assert difference.max() < 2.1
    assert difference.mean() < 0.02
