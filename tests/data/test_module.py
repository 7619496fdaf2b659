"""Batches of crops: their shapes, their order, and what happens to broken images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dino_lightning.config import BuiltinData, CropsConfig, FolderData
from dino_lightning.data.module import MultiCropDataModule
from dino_lightning.errors import UserError

STEP = 5
"""Gray values between one numbered picture and the next."""
BACKENDS = ["pil", "cpu", "device"]


def _crops(backend: str = "pil") -> CropsConfig:
    """Crops that keep a plain picture as it is."""
    plain: dict[str, Any] = {"jitter_p": 0.0, "solarize_p": [0.0] * 3, "mean": [0.0] * 3, "std": [1.0] * 3}
    sizes = {"global_size": 8, "local_size": 4, "local_count": 2, "eval_resize": 8, "eval_size": 8}
    return CropsConfig(backend=backend, **sizes, **plain)


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


def _module(root: Path, *, backend: str = "pil", seed: int = 0, **changes: Any) -> MultiCropDataModule:
    settings: dict[str, Any] = {"batch_size_per_device": 4, "num_workers": 0, "holdout": 0.0, "max_bad_share": 1.0}
    config = FolderData(path=str(root), **{**settings, **changes})
    return MultiCropDataModule(config, _crops(backend), seed=seed, bad_images=root / "bad_images.txt")


def _numbers(crop: Tensor) -> Any:
    """The number of the picture, or a list of them for a batch."""
    return (crop[..., 0, 0, 0] * 255 / STEP).round().int().tolist()


def _batches(module: MultiCropDataModule, *, epoch: int = 0) -> list[list[Tensor]]:
    loader = module.train_dataloader()
    loader.set_epoch(epoch)
    return [module.on_after_batch_transfer(batch, 0) for batch in loader]


def _epoch(module: MultiCropDataModule, *, epoch: int = 0) -> list[int]:
    return [number for batch in _batches(module, epoch=epoch) for number in _numbers(batch[0])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_is_a_list_of_views_without_labels(backend: str, tmp_path: Path) -> None:
    module = _module(_folder(tmp_path, images=8), backend=backend)
    batch = _batches(module)[0]
    assert [tuple(crop.shape) for crop in batch] == [(4, 3, 8, 8)] * 2 + [(4, 3, 4, 4)] * 2
    assert all(_numbers(crop) == _numbers(batch[0]) for crop in batch)  # row b of every view is the same image


def test_an_incomplete_last_batch_is_left_out(tmp_path: Path) -> None:
    module = _module(_folder(tmp_path, images=11))
    seen = _epoch(module)
    assert len(module.train_dataloader()) == 2
    assert len(seen) == len(set(seen)) == 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_epoch_has_its_own_order(backend: str, tmp_path: Path) -> None:
    module = _module(_folder(tmp_path, images=24), backend=backend)
    one, two = _epoch(module, epoch=0), _epoch(module, epoch=1)
    assert sorted(one) == sorted(two) == list(range(24))
    assert one != two
    assert one != list(range(24))
    assert _epoch(module, epoch=0) == one


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    root = _folder(tmp_path, images=24)
    orders = [_epoch(_module(root, seed=seed)) for seed in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_augmentation_depends_only_on_the_seed(backend: str) -> None:
    """Crops, jitter, blur and solarization do not depend on the number of processes or on global random states."""
    runs = []
    for seed, workers in ((3, 0), (3, 2), (4, 0)):
        torch.manual_seed(len(runs))
        data = BuiltinData(train_images=16, val_images=2, batch_size_per_device=4, num_workers=workers)
        crops = CropsConfig(backend=backend, global_size=16, local_size=8, local_count=2)
        state = torch.get_rng_state()
        runs.append([crop for batch in _batches(MultiCropDataModule(data, crops, seed=seed)) for crop in batch])
        assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


def test_an_image_gets_other_crops_in_every_epoch() -> None:
    data = BuiltinData(train_images=4, val_images=2, batch_size_per_device=4, num_workers=0)
    module = MultiCropDataModule(data, CropsConfig(global_size=16, local_count=0), seed=0)
    first, second = (torch.cat([crop for batch in _batches(module, epoch=e) for crop in batch]) for e in (0, 1))
    assert not any(torch.equal(a, b) for a in first for b in second)


@pytest.mark.parametrize("broken", [(2,), (2, 3), (7,), (6, 7, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_image_is_replaced_by_the_next_and_named(
    broken: tuple[int, ...], backend: str, tmp_path: Path
) -> None:
    module = _module(_folder(tmp_path, images=8, broken=broken), backend=backend)
    expected = [next(j % 8 for j in range(i, i + 9) if j % 8 not in broken) for i in range(8)]
    assert sorted(_epoch(module)) == sorted(expected)
    lines = [line.split("\t") for line in (tmp_path / "bad_images.txt").read_text().splitlines()]
    assert sorted(name for name, _ in lines) == sorted(module.sources.train.describe(j) for j in broken)  # type: ignore[union-attr]
    assert all(reason for _, reason in lines)


def test_evaluation_replaces_broken_images_too(tmp_path: Path) -> None:
    root = _folder(tmp_path, images=8, val=4, broken=(2,))
    image, label = _module(root).eval_dataset("train")[2]
    assert (_numbers(image), label) == (3, 0)
    assert "002.png" in (root / "bad_images.txt").read_text()


def _refusal(module: MultiCropDataModule) -> str:
    """What the error says; `pytest.raises` would hold its traceback, and with it the loader processes."""
    try:
        _batches(module)
    except UserError as error:
        return str(error)
    pytest.fail("no error")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("sentence", "broken", "changes"),
    [
        ("data: none of the 8 images can be read", range(8), {}),
        ("data.on_error=raise: ", (1, 2, 3, 5, 6), {"on_error": "raise"}),
        ("data.max_bad_share=0.3: 3 of 8 images", (1, 2, 3, 5, 6), {"max_bad_share": 0.3}),
    ],
)
def test_errors_of_images_are_one_sentence(
    sentence: str, broken: tuple[int, ...], changes: dict[str, Any], workers: int, tmp_path: Path
) -> None:
    """From loader processes too, where PyTorch would hand over a traceback."""
    module = _module(_folder(tmp_path, images=8, broken=tuple(broken)), num_workers=workers, **changes)
    said = _refusal(module)
    assert said.startswith(sentence)
    assert "Traceback" not in said


def test_an_error_of_the_augmentation_is_not_taken_for_a_broken_image(tmp_path: Path) -> None:
    """A bug in the augmentation must not look like a data set of broken images."""
    dataset = _module(_folder(tmp_path, images=4)).train_dataloader().loader.dataset

    def fails(*_: Any) -> None:
        raise ValueError("not the image's fault")

    dataset.crops = fails  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="not the image's fault"):
        dataset.__getitems__([(0, 0)])  # type: ignore[attr-defined]
    assert not (tmp_path / "bad_images.txt").exists()


def test_evaluation_sees_plain_images_in_order(tmp_path: Path) -> None:
    module = _module(_folder(tmp_path, images=8, val=4))
    for split, labels in (("train", [0] * 4 + [1] * 4), ("val", [0, 0, 1, 1])):
        dataset = module.eval_dataset(split)
        assert [_numbers(dataset[i][0]) for i in range(len(dataset))] == list(range(len(labels)))
        assert [dataset[i][1] for i in range(len(dataset))] == labels
        assert dataset[0][0].shape == (3, 8, 8)
    assert module.labeled
    assert (module.classes, module.num_classes) == (["a", "b"], 2)
    np.testing.assert_array_equal(module.train_labels, [0] * 4 + [1] * 4)


def test_images_without_labels(tmp_path: Path) -> None:
    for i in range(4):
        Image.new("RGB", (10, 10), (STEP * i,) * 3).save(tmp_path / f"{i}.png")
    module = _module(tmp_path)
    assert not module.labeled
    assert (module.classes, module.num_classes) == ([], 0)
    np.testing.assert_array_equal(module.train_labels, [-1] * 4)
    with pytest.raises(UserError, match=r"data\.holdout"):
        module.eval_dataset("val")
    assert sorted(_epoch(module)) == [0, 1, 2, 3]


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_a_cache_does_not_change_the_crops(cache: str, tmp_path: Path) -> None:
    root = _folder(tmp_path / "images", images=8, broken=(5,))
    plain = _batches(_module(root, backend="cpu"))
    kept = _batches(_module(root, backend="cpu", cache=cache, cache_dir=str(tmp_path / "cache")))
    assert all(torch.equal(a, b) for one, two in zip(plain, kept, strict=True) for a, b in zip(one, two, strict=True))


def test_the_examples_are_the_crops_of_the_first_epoch(tmp_path: Path) -> None:
    data = BuiltinData(train_images=4, val_images=2, batch_size_per_device=4, num_workers=0)
    module = MultiCropDataModule(data, CropsConfig(backend="cpu", global_size=16, local_count=1), seed=0)
    batch = _batches(module)[0]
    for example in module.example_crops([0, 1, 2, 3]):
        assert any(all(torch.equal(a, b[i]) for a, b in zip(example, batch, strict=True)) for i in range(4))


@pytest.mark.parametrize("early", [True, False])
def test_an_existing_loader_restores_its_position(early: bool, tmp_path: Path) -> None:
    """Under FSDP Lightning makes loaders first and reads the checkpoint then; elsewhere it is the other way round."""
    root = _folder(tmp_path, images=12)
    whole = _epoch(_module(root), epoch=3)
    module, state = _module(root), {"position": {"epoch": 3, "images": 4}}
    if early:
        module.train_dataloader()
        module.load_state_dict(state)
        loader = module._loader
    else:
        module.load_state_dict(state)
        loader = module.train_dataloader()
    assert loader is not None
    found = [number for batch in loader for number in _numbers(module.on_after_batch_transfer(batch, 0)[0])]
    assert found == whole[4:]
