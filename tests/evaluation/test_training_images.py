"""Augmented training images: reproducible, and independent of the process that makes them."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DistributedSampler

from dino_lightning.config import DataConfig
from dino_lightning.errors import UserError
from dino_lightning.evaluation.classification.training_images import TrainingImages, TrainingLoader
from dino_lightning.evaluation.features.images import BROKEN

SHAPE = (3, 4, 4)


class Colors:
    """`images` squares whose red is their number, labeled by threes; number 4 has no label."""

    classes: list[str] | None = None

    def __init__(self, images: int, *, broken: tuple[int, ...] = ()) -> None:
        self.labels, self.broken = np.arange(images) % 3, broken
        self.labels[4] = -1

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> np.ndarray | bytes:
        if index in self.broken:
            return b"broken"
        return np.full((4, 4, 3), index, np.uint8)

    def describe(self, index: int) -> str:
        return f"square {index}"

    def fingerprint(self) -> str:
        return "colors"


def noisy(image: Image.Image) -> Tensor:
    """Red, and one number of each of the three sources of chance."""
    red = float(np.asarray(image)[0, 0, 0])
    drawn = torch.tensor([red, random.random(), float(np.random.rand()), float(torch.rand(()))], dtype=torch.float32)
    return drawn[:, None].expand(4, 4).expand(SHAPE[0], 4, 4)


def epochs(images: TrainingImages, *, numbers: list[int], workers: int = 0, **options: Any) -> list[Any]:
    options = {"batch_size": 4, "device": torch.device("cpu"), "num_workers": workers, **options}
    loader = TrainingLoader(images, **options)
    found = [[(pixels.clone(), labels.tolist()) for pixels, labels in loader.epoch(number)] for number in numbers]
    assert all(len(batches) == len(loader) for batches in found)
    return found


def training_images(*, seed: int = 1, broken: tuple[int, ...] = (), **config: Any) -> TrainingImages:
    return TrainingImages(Colors(19, broken=broken), noisy, seed=seed, blank=SHAPE, config=DataConfig(**config))


def test_order_and_labels() -> None:
    batches = epochs(training_images(), numbers=[2])[0]
    sampler = DistributedSampler(range(18), num_replicas=1, rank=0, seed=1)  # type: ignore[arg-type]
    sampler.set_epoch(2)
    expected = [number + (number >= 4) for number in sampler]  # image 4 has no label
    assert [int(row[0, 0, 0]) for pixels, _ in batches for row in pixels] == expected
    assert [label for _, labels in batches for label in labels] == [index % 3 for index in expected]
    assert [len(labels) for _, labels in batches] == [4, 4, 4, 4, 2]
    whole = epochs(training_images(), numbers=[2], drop_last=True)[0]
    assert [len(labels) for _, labels in whole] == [4, 4, 4, 4]


def by_image(batches: list[Any]) -> dict[int, list[float]]:
    return {int(row[0, 0, 0]): row[0, 1:, 0].tolist() for pixels, _ in batches for row in pixels}


def test_augmentation_depends_on_seed_epoch_and_image_alone() -> None:
    first, second = map(by_image, epochs(training_images(), numbers=[0, 1]))
    random.seed(11)
    np.random.seed(11)
    torch.manual_seed(11)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[union-attr]
    (alone,) = map(by_image, epochs(training_images(), numbers=[1], batch_size=3))
    assert state[:2] == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[union-attr]
    assert torch.equal(state[2], torch.get_rng_state())
    assert alone == second
    numbers = [value for draws in (*first.values(), *second.values()) for value in draws]
    assert len(set(numbers)) == len(numbers)
    (other,) = map(by_image, epochs(training_images(seed=2), numbers=[1]))
    assert all(other[index] != second[index] for index in other)


def test_loader_processes_change_nothing() -> None:
    alone, shared = (epochs(training_images(broken=(7,), max_bad_share=1), numbers=[0, 1], workers=w) for w in (0, 2))
    for one, other in zip(alone, shared, strict=True):
        for (pixels, labels), (pixels_too, labels_too) in zip(one, other, strict=True):
            assert torch.equal(pixels, pixels_too)
            assert labels == labels_too


def test_broken_images_are_left_out() -> None:
    images = training_images(broken=(0, 1, 2, 3, 7), max_bad_share=1)
    assert images[0, 0][1] == BROKEN
    (batches,) = epochs(images, numbers=[0], batch_size=1)
    assert sum(len(labels) for _, labels in batches) == 13
    assert {tuple(pixels.shape) for pixels, _ in batches} == {(0, *SHAPE), (1, *SHAPE)}


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_images_are_one_sentence(workers: int) -> None:
    with pytest.raises(UserError, match=r"^data.max_bad_share=0.05: 1 of 19 images cannot be read") as error:
        epochs(training_images(broken=(7,)), numbers=[0], workers=workers)
    assert "\n" not in str(error.value)
