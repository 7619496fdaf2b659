"""Batches of crops, evaluation and masks: their properties for images and settings of any size."""

import dataclasses
import pickle
from typing import Any

import numpy as np
import torch
from crop_cases import BACKENDS, RAW, finished, pixels
from crop_draws import SEEDS, configs, pairs, random_image
from hypothesis import given
from hypothesis import strategies as st
from interpolation import interpolated
from PIL import Image
from profiles import check, examples
from torch import Tensor

from dino_lightning.config import CropsConfig
from dino_lightning.data.batches import MultiCropDataset, crop_seed
from dino_lightning.data.crops import EvalView, RawCrops, crop_backend
from dino_lightning.models.masking import Masks, draw_masks

LONG = st.one_of(st.integers(1, 3), st.integers(1, 40), st.integers(1000, 3000))
SIZES = st.one_of(
    st.tuples(st.integers(1, 3), LONG),
    st.tuples(LONG, st.integers(1, 3)),
    st.tuples(st.integers(1, 50), st.integers(1, 50)),
)


@examples(few=40, many=1500)
def test_crops_of_any_image_are_complete_and_finite(examples: Any) -> None:
    def holds(sizes: list[tuple[int, int]], config: CropsConfig, seed: int) -> None:
        images = [random_image(*size, seed=seed % 100) for size in sizes]
        seeds = [seed ^ number for number in range(len(images))]
        for backend in BACKENDS:
            views = finished(backend, config, images, seeds)
            sides = [config.global_size] * 2 + [config.local_size] * config.local_count
            assert [tuple(view.shape) for view in views] == [(len(images), 3, side, side) for side in sides]
            for view in views:
                assert view.dtype == torch.float32
                assert view.isfinite().all(), backend
                assert view.min() >= -0.01
                assert view.max() <= 255.01

    check(holds, given(st.lists(SIZES, min_size=1, max_size=3), configs(geometric_only=False), SEEDS), examples)


@examples(few=40, many=1500)
def test_cpu_and_device_cut_the_same(examples: Any) -> None:
    """`pil` draws other random numbers, so it is not compared here."""

    def holds(sizes: list[tuple[int, int]], config: CropsConfig, seed: int) -> None:
        images = [random_image(*size, seed=seed % 100) for size in sizes]
        seeds = [seed ^ number for number in range(len(images))]
        cpu, device = (finished(backend, config, images, seeds) for backend in ("cpu", "device"))
        for ours, theirs in zip(cpu, device, strict=True):
            assert (ours - theirs).abs().max() <= 0.01

    check(holds, given(st.lists(SIZES, min_size=1, max_size=3), configs(geometric_only=True), SEEDS), examples)


class Images:
    """Readable images by index, as `MultiCropDataset` needs them."""

    def __init__(self, images: list[Any]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], index


def crops_by_image(batch: Any, config: CropsConfig) -> list[list[Tensor]]:
    views = batch.augment(config) if isinstance(batch, RawCrops) else batch
    return [[view[number] for view in views] for number in range(len(views[0]))]


@examples(few=25, many=600)
def test_crops_depend_on_seed_epoch_and_image_alone(examples: Any) -> None:
    """Crops do not depend on the batch, the order in it, or the loader process, which has a copy of the images."""

    def holds(seed: int, keys: list[tuple[int, int]], processes: list[int], backend: str, config: CropsConfig) -> None:
        pictures = [random_image(9 + 4 * number, 30 - 3 * number, seed=number) for number in range(6)]
        make = crop_backend(dataclasses.replace(config, backend=backend), channels=3)
        images: Any = Images([pixels(p) if make.decoding == "pixels" else p for p in pictures])
        batches = MultiCropDataset(images, make, seed=seed)
        copy = pickle.loads(pickle.dumps(MultiCropDataset(images, make, seed=seed))) if backend != "cpu" else batches
        alone = {key: crops_by_image(batches.__getitems__([key]), config)[0] for key in keys}
        for process in set(processes):
            batch = [key for key, each in zip(keys, processes, strict=False) if each == process]
            views = crops_by_image(copy.__getitems__(batch), config) if batch else []
            for key, crops in zip(batch, views, strict=True):
                for ours, theirs in zip(crops, alone[key], strict=True):
                    assert (ours - theirs).abs().max() <= (0.01 if backend == "device" else 0)

    key = st.tuples(st.integers(0, 10**6), st.integers(0, 5))
    keys = st.lists(key, min_size=1, max_size=7, unique=True)
    processes = st.lists(st.integers(0, 2), min_size=7, max_size=7)
    check(
        holds,
        given(st.integers(0, 2**32 - 1), keys, processes, st.sampled_from(BACKENDS), configs(geometric_only=True)),
        examples,
    )


@examples(few=200, many=5000)
def test_seeds_of_crops_differ(examples: Any) -> None:
    def holds(keys: list[tuple[int, int, int]]) -> None:
        seeds = {crop_seed(*key) for key in keys}
        assert len(seeds) == len(keys)
        assert all(0 <= seed < 2**63 for seed in seeds)

    number = st.integers(0, 2**40)
    check(holds, given(st.lists(st.tuples(number, number, number), unique=True, max_size=20)), examples)


# --------------------------------------------------------------------------------------------- evaluation and masking


@examples(few=60, many=1500)
def test_evaluation_sees_the_center(examples: Any) -> None:
    """The shorter side is resized to `eval_resize`, the longer in proportion, rounded down; then the center is cut."""

    def holds(size: tuple[int, int], resize: int, part: int, seed: int) -> None:
        width, height = size
        config = dataclasses.replace(RAW, eval_resize=resize, eval_size=min(part, resize))
        image = random_image(width, height, seed)
        long = int(resize * max(size) / min(size))
        w, h = (resize, long) if width <= height else (long, resize)
        resized = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC))
        side = config.eval_size
        top, left = round((h - side) / 2), round((w - side) / 2)
        assert 0 <= top <= h - side
        assert 0 <= left <= w - side
        expected = torch.from_numpy(resized[top : top + side, left : left + side].copy()).permute(2, 0, 1)
        ours = EvalView(config)(image)
        assert tuple(ours.shape) == (3, side, side)
        assert (ours - expected).abs().max() < 0.01
        of_tensor = EvalView(config)(pixels(image))
        assert tuple(of_tensor.shape) == (3, side, side)
        assert of_tensor.isfinite().all()
        if w * h < 5000:  # the reference is slow
            reference = interpolated(pixels(image), w, h)[:, top : top + side, left : left + side]
            assert (of_tensor - reference).abs().max() < 2.01

    sizes = st.one_of(st.tuples(st.integers(1, 60), st.integers(1, 60)), st.sampled_from([(1, 900), (900, 1)]))
    check(holds, given(sizes, st.integers(2, 48), st.integers(1, 48), st.integers(0, 99)), examples)


@examples(few=100, many=4000)
def test_masks_hide_at_most_the_requested_share(examples: Any) -> None:
    def holds(grid: tuple[int, int], crops: int, p: float, share: list[float], seed: int) -> None:
        mask = draw_masks(np.random.default_rng(seed), crops, grid, probability=p, share=share)
        again = draw_masks(np.random.default_rng(seed), crops, grid, probability=p, share=share)
        assert (mask == again).all()
        masks = Masks.of(mask, like=torch.zeros(1, dtype=torch.float64))
        positions, weights = [], []
        for number, crop_mask in enumerate(mask.reshape(crops, -1).tolist()):
            hidden = [i for i, is_hidden in enumerate(crop_mask) if is_hidden]
            assert len(hidden) <= max(1, round(share[1] * len(crop_mask)))
            assert p > 0 or not hidden
            positions += [number * len(crop_mask) + i for i in hidden]
            weights += [1 / (crops * len(hidden)) for _ in hidden]
        assert masks.positions.tolist() == positions
        assert np.allclose(masks.weights.numpy(), weights, rtol=1e-12)
        assert len(masks) == int(mask.sum())

    grids = st.tuples(st.integers(1, 20), st.integers(1, 20))
    probability = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
    check(
        holds,
        given(grids, st.integers(1, 6), probability, pairs(0, 1, open_below=True), st.integers(0, 2**32)),
        examples,
    )
