"""Batches of crops: their shapes, their order, and what happens to broken images."""

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dino_lightning.config import BuiltinData, CropsConfig, FolderData
from dino_lightning.data.module import MultiCropDataModule, stack_crops
from dino_lightning.errors import UserError

STEP = 5
"""Grey values between one numbered picture and the next."""


def _crops() -> CropsConfig:
    """Crops that keep a plain picture as it is."""
    plain: dict[str, Any] = {"jitter_p": 0.0, "solarize_p": [0.0] * 3, "mean": [0.0] * 3, "std": [1.0] * 3}
    return CropsConfig(global_size=8, local_size=4, local_count=2, eval_resize=8, eval_size=8, **plain)


def _folder(root: Path, *, images: int, val: int = 0, broken: tuple[int, ...] = ()) -> Path:
    """Plain pictures 0, 1, ... of two classes; the names sort as the numbers do within a class."""
    for split, count in (("train", images), ("val", val)):
        for i in range(count):
            path = root / split / ("ab"[2 * i // count]) / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (10, 10), (STEP * i,) * 3).save(path)
            if split == "train" and i in broken:
                path.write_bytes(path.read_bytes()[:40] if i % 2 else b"no picture at all")
    return root


def _module(root: Path) -> MultiCropDataModule:
    config = FolderData(path=str(root), batch_size_per_device=4, num_workers=0, pin_memory=False, holdout=0.0)
    return MultiCropDataModule(config, _crops(), seed=0, bad_images=root / "bad_images.txt")


def _numbers(crop: Tensor) -> Any:
    """The number of the picture, or a list of them for a batch."""
    return (crop[..., 0, 0, 0] * 255 / STEP).round().int().tolist()


def _epoch(module: MultiCropDataModule) -> list[int]:
    return [number for batch in module.train_dataloader() for number in _numbers(batch[0])]


def test_stacks_crops_view_by_view() -> None:
    samples = [([torch.full((3, 4, 4), 10.0 * b), torch.full((3, 2, 2), 10.0 * b + 1)], b) for b in range(3)]
    first, second = stack_crops(samples)
    assert (first.shape, second.shape) == ((3, 3, 4, 4), (3, 3, 2, 2))
    assert first[:, 0, 0, 0].tolist() == [0, 10, 20]
    assert second[:, 0, 0, 0].tolist() == [1, 11, 21]


def test_a_batch_is_a_list_of_views_without_labels(tmp_path: Path) -> None:
    module = _module(_folder(tmp_path, images=8))
    batch = next(iter(module.train_dataloader()))
    assert [tuple(crop.shape) for crop in batch] == [(4, 3, 8, 8)] * 2 + [(4, 3, 4, 4)] * 2
    assert all(_numbers(crop) == _numbers(batch[0]) for crop in batch)  # row b of every view is the same image


def test_an_incomplete_last_batch_is_left_out(tmp_path: Path) -> None:
    loader = _module(_folder(tmp_path, images=11)).train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == 2
    seen = [number for batch in batches for number in _numbers(batch[0])]
    assert len(set(seen)) == 8


def test_every_epoch_has_its_own_order(tmp_path: Path) -> None:
    module = _module(_folder(tmp_path, images=24))
    loader = module.train_dataloader()
    one, two = ([n for batch in loader for n in _numbers(batch[0])] for _ in range(2))
    assert sorted(one) == sorted(two) == list(range(24))
    assert one != two
    assert one != list(range(24))


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    module = _module(_folder(tmp_path, images=24))
    orders = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        orders.append(_epoch(module))
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_seed_decides_the_augmentation(workers: int, tmp_path: Path) -> None:
    """Crops, jitter, blur and solarisation, in this process and in workers."""
    data = BuiltinData(train_images=8, val_images=2, batch_size_per_device=4, num_workers=workers, pin_memory=False)
    crops = CropsConfig(global_size=16, local_size=8, local_count=2)
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        random.seed(seed)
        runs.append([crop for batch in MultiCropDataModule(data, crops, seed=0).train_dataloader() for crop in batch])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


@pytest.mark.parametrize("broken", [(2,), (2, 3), (7,), (6, 7, 0)])
def test_a_broken_image_is_replaced_by_the_next_and_named(broken: tuple[int, ...], tmp_path: Path) -> None:
    dataset = _module(_folder(tmp_path, images=8, broken=broken)).train_dataset()
    log = tmp_path / "bad_images.txt"
    for i in range(8):
        log.write_text("")
        crops, label = dataset[i]
        passed = list(itertools.takewhile(lambda j: j in broken, (j % 8 for j in range(i, i + 8))))
        expected = (i + len(passed)) % 8
        assert {_numbers(crop) for crop in crops} == {expected}
        assert label == dataset.source.labels[expected]
        lines = [line.split("\t") for line in log.read_text().splitlines()]
        assert [name for name, _ in lines] == [dataset.source.describe(j) for j in passed]
        assert all("Error: " in reason for _, reason in lines)


def test_evaluation_replaces_broken_images_too(tmp_path: Path) -> None:
    root = _folder(tmp_path, images=8, val=4, broken=(2,))
    image, label = _module(root).eval_dataset("train")[2]
    assert (_numbers(image), label) == (3, 0)
    assert "002.png" in (root / "bad_images.txt").read_text()


def test_a_folder_without_one_good_image_is_an_error(tmp_path: Path) -> None:
    module = _module(_folder(tmp_path, images=4, broken=(0, 1, 2, 3)))
    with pytest.raises(UserError, match="none of the images can be read"):
        module.train_dataset()[0]


def test_an_error_of_the_transform_is_not_taken_for_a_broken_image(tmp_path: Path) -> None:
    """A bug in the augmentation must not look like a data set of broken images."""
    dataset = _module(_folder(tmp_path, images=4)).train_dataset()

    def fails(_: Image.Image) -> None:
        raise ValueError("not the image's fault")

    dataset.transform = fails
    with pytest.raises(ValueError, match="not the image's fault"):
        dataset[0]
    assert not (tmp_path / "bad_images.txt").exists()


def test_evaluation_sees_plain_images_in_order(tmp_path: Path) -> None:
    module = _module(_folder(tmp_path, images=8, val=4))
    for split, labels in (("train", [0] * 4 + [1] * 4), ("val", [0, 0, 1, 1])):
        dataset = module.eval_dataset(split)
        assert [_numbers(dataset[i][0]) for i in range(len(dataset))] == list(range(len(labels)))
        assert [dataset[i][1] for i in range(len(dataset))] == labels
        assert dataset[0][0].shape == (3, 8, 8)
    assert module.labelled
    assert (module.classes, module.num_classes) == (["a", "b"], 2)
    np.testing.assert_array_equal(module.train_labels, [0] * 4 + [1] * 4)


def test_images_without_labels(tmp_path: Path) -> None:
    for i in range(4):
        Image.new("RGB", (10, 10), (STEP * i,) * 3).save(tmp_path / f"{i}.png")
    module = _module(tmp_path)
    assert not module.labelled
    assert (module.classes, module.num_classes) == ([], 0)
    np.testing.assert_array_equal(module.train_labels, [-1] * 4)
    with pytest.raises(UserError, match=r"data\.holdout"):
        module.eval_dataset("val")
    assert sorted(_epoch(module)) == [0, 1, 2, 3]
