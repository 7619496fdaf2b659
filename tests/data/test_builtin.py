"""The built-in pictures: reproducible by seed, balanced, exactly masked, and not identifiable by simple comparisons."""

from dataclasses import replace

import numpy as np
import pytest
from source_cases import check_consistent

from dino_lightning.data.sources.builtin import SPECIES, BuiltinImages, PictureRNG, Species, draw


@pytest.fixture(scope="module")
def train() -> BuiltinImages:
    return BuiltinImages("train", images=2400, image_size=32, draw_seed=0)


@pytest.fixture(scope="module")
def val() -> BuiltinImages:
    return BuiltinImages("val", images=600, image_size=32, draw_seed=0)


def nearest_label_rate(bank: np.ndarray, queries: np.ndarray, *, labels: np.ndarray, truth: np.ndarray) -> float:
    """How often the nearest row of the bank (n, d) has a query's label."""
    squared = (bank**2).sum(1) - 2 * queries @ bank.T
    return float((labels[squared.argmin(1)] == truth).mean())


def grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask (n, H, W) with a margin of some pixels."""
    for _ in range(pixels):
        padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
        H, W = mask.shape[1:]
        mask = np.logical_or.reduce([padded[:, i : i + H, j : j + W] for i in range(3) for j in range(3)])
    return mask


def test_a_picture_depends_only_on_seed_split_and_index(val: BuiltinImages) -> None:
    again = BuiltinImages("val", images=30, image_size=32, draw_seed=0)
    assert np.array_equal(again.images, val.images[:30])
    assert np.array_equal(again.masks, val.masks[:30])
    other_seed = BuiltinImages("val", images=30, image_size=32, draw_seed=1)
    assert not (other_seed.images == val.images[:30]).all(axis=(1, 2, 3)).any()


def test_no_picture_occurs_twice(train: BuiltinImages, val: BuiltinImages) -> None:
    seen = {image.tobytes() for image in [*train.images, *val.images]}
    assert len(seen) == len(train) + len(val)


def test_train_and_val_differ_in_every_picture(train: BuiltinImages, val: BuiltinImages) -> None:
    # A repeated scene in other light would pass the test of bytes.
    bank, queries = (part.images[:600].reshape(600, -1) / 255.0 for part in (train, val))
    squared = (bank**2).sum(1) - 2 * queries @ bank.T + (queries**2).sum(1)[:, None]
    assert np.sqrt(squared.min() / bank.shape[1]) > 0.1


@pytest.mark.parametrize("images", [12, 31, 600])
def test_classes_are_balanced(images: int) -> None:
    data = BuiltinImages("train", images=images, image_size=16, draw_seed=3)
    counts = np.bincount(data.labels, minlength=len(data.classes))
    assert len(set(data.classes)) == len(data.classes) == 12
    assert counts.max() - counts.min() <= 1
    assert data.labels.dtype == np.int64


def test_the_interface_of_sources() -> None:
    check_consistent(BuiltinImages("val", images=30, image_size=16, draw_seed=0))


def test_objects_are_visible(train: BuiltinImages) -> None:
    share = train.masks.mean(axis=(1, 2))
    assert train.mask(0).shape == (32, 32)
    assert train.mask(0).dtype == bool
    assert share.min() > 0.08
    assert share.max() < 0.6
    by_class = [share[train.labels == label].mean() for label in range(12)]
    assert min(by_class) > 0.15
    assert max(by_class) < 0.4


@pytest.mark.parametrize("species", SPECIES, ids=lambda species: species.name)
def test_the_mask_covers_the_palette(species: Species) -> None:
    seeds = [[7, 0, index] for index in range(8)]
    images, masks = draw(species, PictureRNG(seeds), 64)
    recolored = replace(species, palette=[(255 - r, 128, 255 - b) for r, _, b in species.palette])
    others, same_masks = draw(recolored, PictureRNG(seeds), 64)
    changed = (images != others).any(axis=-1)
    assert np.array_equal(masks, same_masks)
    assert changed[masks].all()
    # Edges are soft over a pixel, half of it outside; the tips of antennae and arms fade over a few more.
    assert (changed & ~grown(masks, 1)).sum() < 0.02 * masks.sum()


def test_a_larger_picture_shows_the_same() -> None:
    small = BuiltinImages("val", images=24, image_size=32, draw_seed=0)
    large = BuiltinImages("val", images=24, image_size=96, draw_seed=0)
    assert large.read(0).shape == (96, 96, 3)
    shrunk = large.images.astype(float).reshape(24, 32, 3, 32, 3, 3).mean(axis=(2, 4))
    difference = np.abs(shrunk[:, None] - small.images[None]).mean(axis=(2, 3, 4))
    # Cells of the mosaic have hard edges, so a pixel may differ; another picture differs by some 60 of 255.
    assert difference.diagonal().max() < 20
    assert difference[~np.eye(24, dtype=bool)].min() > 30
    overlap = [(large.mask(i)[1::3, 1::3] == small.mask(i)).mean() for i in range(24)]
    assert min(overlap) > 0.97


def test_the_background_does_not_identify_the_species(train: BuiltinImages, val: BuiltinImages) -> None:
    def outside(data: BuiltinImages) -> np.ndarray:
        away = ~grown(data.masks, 4)[..., None]
        return (data.images * away).sum(axis=(1, 2)) / away.sum(axis=(1, 2)).clip(1)

    rate = nearest_label_rate(outside(train), outside(val), labels=train.labels, truth=val.labels)
    assert rate < 0.15  # chance is 0.083, with a standard deviation of 0.011 over 600 pictures


def test_simple_comparisons_identify_at_most_half_of_the_pictures(train: BuiltinImages, val: BuiltinImages) -> None:
    answers = {"labels": train.labels, "truth": val.labels}
    means = [data.images.mean(axis=(1, 2)) for data in (train, val)]
    pixels = [data.images.reshape(len(data), -1) / 255.0 for data in (train, val)]
    assert nearest_label_rate(*means, **answers) < 0.55
    assert nearest_label_rate(*pixels, **answers) < 0.45


def test_the_object_identifies_the_species(train: BuiltinImages, val: BuiltinImages) -> None:
    def inside(data: BuiltinImages) -> np.ndarray:
        return (data.images * data.masks[..., None]).sum(axis=(1, 2)) / data.masks.sum(axis=(1, 2))[:, None]

    assert nearest_label_rate(inside(train), inside(val), labels=train.labels, truth=val.labels) > 0.85
