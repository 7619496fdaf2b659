"""The three back ends: what comes out of them, on the way to an accelerator as well."""

import dataclasses
import pickle
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from crop_cases import BACKENDS, RAW, SMALL, check_agree, finished, picture, pixels
from PIL import Image
from torch import Tensor

from dino_lightning.config import CropsConfig
from dino_lightning.data.crops import RawCrops, crop_backend, without_color
from dino_lightning.data.crops.backends import CPUBatches
from dino_lightning.data.crops.sampling import FastRNG, sample_crops

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _pictures(count: int) -> list[Image.Image]:
    """Of three sizes."""
    return [picture(*[(80, 60), (50, 90), (30, 40)][i % 3], seed=i) for i in range(count)]


# ------------------------------------------------------------------------------------------------ shapes and seeds


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("local_count", [0, 3])
@pytest.mark.parametrize("count", [1, 5])
def test_shapes_and_types(count: int, local_count: int, backend: str) -> None:
    config = dataclasses.replace(CropsConfig(), global_size=24, local_size=12, local_count=local_count)
    views = finished(backend, config, _pictures(count), range(count))
    assert isinstance(views, list)
    assert [tuple(view.shape) for view in views] == [(count, 3, 24, 24)] * 2 + [(count, 3, 12, 12)] * local_count
    assert {view.dtype for view in views} == {torch.float32}
    assert all(view.isfinite().all() for view in views)
    assert -2.2 < min(view.min().item() for view in views) < max(view.max().item() for view in views) < 2.7


@pytest.mark.parametrize("count", [1, 17])
def test_cpu_and_device_are_equal(count: int) -> None:
    cpu, device = (finished(backend, SMALL, _pictures(count), range(count)) for backend in ("cpu", "device"))
    crops = [
        sample_crops(SMALL, width=image.width, height=image.height, rng=FastRNG(seed))
        for seed, image in enumerate(_pictures(count))
    ]
    for view, (ours, theirs) in enumerate(zip(cpu, device, strict=True)):
        check_agree(ours, theirs, crops=[some[view] for some in crops])


@pytest.mark.parametrize("backend", BACKENDS)
def test_crops_depend_only_on_the_seed_of_their_image(backend: str) -> None:
    """At every position in a batch; another seed gives other crops."""
    images = _pictures(11)
    whole = finished(backend, SMALL, images, range(11))
    backwards = finished(backend, SMALL, images[::-1], range(10, -1, -1))
    others = finished(backend, SMALL, images, range(50, 61))
    for view, mirrored, other in zip(whole, backwards, others, strict=True):
        torch.testing.assert_close(view, mirrored.flip(0), rtol=0, atol=2e-3)
        assert (view - other).abs().mean((1, 2, 3)).min() > 1
    again = finished(backend, SMALL, images, range(11))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_crops_and_global_random_states_are_independent(backend: str) -> None:
    before = random.getstate(), torch.get_rng_state(), repr(np.random.get_state())
    finished(backend, SMALL, _pictures(3), range(3))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert repr(np.random.get_state()) == before[2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_smallest_and_longest_images(backend: str) -> None:
    images = [picture(*size) for size in ((1, 1), (2, 300), (300, 2), (5, 4))]
    views = finished(backend, SMALL, images, range(4))
    assert all(view.isfinite().all() for view in views)
    assert all(view.shape[0] == 4 for view in views)


@pytest.mark.parametrize("backend", ["cpu", "device"])
def test_images_of_any_layout_are_not_overwritten(backend: str) -> None:
    """The decoder gives channels last; a box as large as a crop is not resized and must not be the image itself."""
    config = dataclasses.replace(SMALL, backend=backend, global_scale=[1.0, 1.0], ratio=[1.0, 1.0])
    planar = [pixels(picture(48, 48, seed=i)) for i in range(4)]
    interleaved = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in planar]
    copies = [image.clone() for image in planar]
    batches = [crop_backend(config, channels=3)(images, range(4)) for images in (planar, interleaved)]
    first, second = (batch.augment(config) if isinstance(batch, RawCrops) else batch for batch in batches)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(planar, copies, strict=True))


# ------------------------------------------------------------------------------------------- probability 0, channels

UNCHANGED: dict[str, Any] = {
    "flip_p": 0.0,
    "jitter_p": 0.0,
    "grayscale_p": 0.0,
    "blur_p": [0.0] * 3,
    "solarize_p": [0.0] * 3,
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_operators_crops_are_cut_only(backend: str) -> None:
    images, config = _pictures(9), dataclasses.replace(SMALL, **UNCHANGED, global_scale=[1.0, 1.0], ratio=[0.1, 10.0])
    views = finished(backend, config, [image.resize((48, 48)) for image in images], range(9))
    whole = torch.stack([pixels(image.resize((48, 48))) for image in images]).float()
    # A box of the whole area that is not a square does not fit, so that the fallback gives all of the image.
    assert all((view - whole).abs().max() < 1e-3 for view in views[:2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gray_images(backend: str) -> None:
    config = dataclasses.replace(SMALL, mean=[0.0], std=[1 / 255])
    images = [image.convert("L") for image in _pictures(9)]
    views = finished(backend, config, images, range(9))
    assert [tuple(view.shape) for view in views] == [(9, 1, 48, 48)] * 2 + [(9, 1, 24, 24)] * 2
    assert all(0 <= view.min() <= view.max() <= 255 + 1e-3 for view in views)
    assert all(view.std((1, 2, 3)).min() > 0.5 for view in views)


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_other_numbers_of_channels(channels: int) -> None:
    """Gray pictures in every channel stay so: nothing mixes channels but the contrast, which takes them all alike."""
    config = dataclasses.replace(SMALL, backend="cpu", mean=[0.0] * channels, std=[1 / 255] * channels)
    gray = [pixels(image.convert("L")) for image in _pictures(9)]
    views = crop_backend(config, channels=channels)([image.expand(channels, -1, -1) for image in gray], range(9))
    alone = dataclasses.replace(config, mean=[0.0], std=[1 / 255])
    expected = crop_backend(alone, channels=1)(gray, range(9))
    assert isinstance(views, list)
    assert isinstance(expected, list)
    for view, single in zip(views, expected, strict=True):
        assert view.shape[1] == channels
        torch.testing.assert_close(view, single.expand_as(view), rtol=0, atol=1e-2)


def test_without_color_only_the_operators_of_color_are_off() -> None:
    config = without_color(CropsConfig())
    assert (config.saturation, config.hue, config.grayscale_p) == (0.0, 0.0, 0.0)
    default = CropsConfig()
    restored = dataclasses.replace(
        config, saturation=default.saturation, hue=default.hue, grayscale_p=default.grayscale_p
    )
    assert restored == default


# ---------------------------------------------------------------------------------- on the way to the accelerator


def _cut_pictures(images: list[Image.Image], seeds: Sequence[int], config: CropsConfig = SMALL) -> RawCrops:
    backend = crop_backend(dataclasses.replace(config, backend="device"), channels=3)
    batch = backend([pixels(image) for image in images], seeds)
    assert isinstance(batch, RawCrops)
    return batch


def _cut(config: CropsConfig = SMALL) -> RawCrops:
    return _cut_pictures(_pictures(9), range(9), config)


def _check_equal(ours: list[Tensor], theirs: list[Tensor], *, atol: float = 0.0) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=atol)


def test_cut_crops_are_sent_between_processes() -> None:
    """As uint8, a quarter of the finished crops."""
    batch = _cut()
    copy = pickle.loads(pickle.dumps(batch))
    assert {group.crops.dtype for group in copy.groups} == {torch.uint8}
    assert [group.views for group in copy.groups] == [2, 2]
    _check_equal(copy.augment(SMALL), batch.to("cpu").augment(SMALL))


def _cut_here(numbers: Sequence[int]) -> RawCrops:
    """A loader's worker gets it by name."""
    return _cut_pictures([picture(80, 60, seed=number) for number in numbers], numbers)


def test_a_loader_s_worker_sends_the_cut_crops() -> None:
    numbers: Any = range(4)
    loader = torch.utils.data.DataLoader(numbers, batch_size=2, num_workers=1, collate_fn=_cut_here)
    for start, batch in zip((0, 2), loader, strict=True):
        _check_equal(batch.augment(SMALL), _cut_here(range(start, start + 2)).augment(SMALL))


def test_cut_crops_to_their_own_device_are_the_same() -> None:
    first = _cut()
    moved = first.to("cpu").to(torch.device("cpu"))
    assert [group.plan.order for group in moved.groups] == [group.plan.order for group in first.groups]
    _check_equal(moved.augment(SMALL), _cut().augment(SMALL))


def test_augmentation_leaves_no_graph() -> None:
    assert not any(view.requires_grad for view in _cut().augment(SMALL))


@needs_cuda
def test_pinned_crops_are_the_same() -> None:
    pinned = _cut().pin_memory()
    assert all(group.crops.is_pinned() and group.plan.numbers.tensor.is_pinned() for group in pinned.groups)
    _check_equal(pinned.augment(SMALL), _cut().augment(SMALL))


@needs_cuda
@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(RAW, local_count=2)])
def test_accelerators_give_the_crops_of_the_cpu(config: CropsConfig) -> None:
    """Within what the blur of a CPU leaves out, and the TF32 that a product of matrices may use: 1 of 255."""
    _check_equal(_cut(config).to("cuda").augment(config), _cut(config).augment(config), atol=1.0)


@needs_cuda
def test_augmentation_does_not_wait_for_the_accelerator() -> None:
    batch = _cut().to("cuda")
    batch.augment(SMALL)
    batch = _cut().to("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch.augment(SMALL)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_images_do_not_depend_on_their_batch() -> None:
    """An image has the same crops in a batch of one image."""
    backend = CPUBatches(SMALL)
    images = [pixels(image) for image in _pictures(17)]
    whole = backend(images, range(17))
    for i in (0, 7, 8, 15, 16):
        _check_equal([view[i : i + 1] for view in whole], backend(images[i : i + 1], [i]), atol=1e-3)
