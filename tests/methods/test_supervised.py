"""Supervised training: the right label for each image, its loss, and where there are no labels."""

from pathlib import Path
from typing import Any

import oracles_methods
import pytest
import tiny
import tiny_methods
import torch
import torch.nn.functional as F
from PIL import Image
from test_wrong_settings import sentence_for
from torch import Tensor

from dino_lightning.config import CropsConfig, FolderData
from dino_lightning.data.batch import LabeledCrops, num_images
from dino_lightning.data.module import MultiCropDataModule

STEP, CLASSES = 5, "abc"
"""Gray values between one numbered picture and the next."""
EXACT = {"rtol": 1e-10, "atol": 1e-12}


# -------------------------------------------------------------------------------------------------------------- data


def folder(root: Path, *, images: int = 24, broken: tuple[int, ...] = ()) -> Path:
    """Plain pictures 0, 1, ...; in the order of the data set their classes are a, a, ..., b, ..., c."""
    for i in range(images):
        path = root / "train" / CLASSES[class_of(i, images)] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 10), (STEP * i,) * 3).save(path)
        if i in broken:
            path.write_bytes(b"no picture at all")
    return root


def class_of(number: int, images: int = 24) -> int:
    return number * len(CLASSES) // images


def module(root: Path, *, backend: str = "pil", labels: bool = True, **data: Any) -> MultiCropDataModule:
    plain: dict[str, Any] = {"jitter_p": 0.0, "solarize_p": [0.0] * 3, "mean": [0.0] * 3, "std": [1.0] * 3}
    sizes = {"global_size": 8, "local_size": 4, "local_count": 2, "eval_resize": 8, "eval_size": 8}
    settings = {"batch_size_per_device": 4, "num_workers": 0, "holdout": 0.0, "max_bad_share": 1.0, **data}
    config = FolderData(path=str(root), **settings)
    crops = CropsConfig(backend=backend, **sizes, **plain)
    return MultiCropDataModule(config, crops, seed=0, bad_images=root / "bad_images.txt", labels=labels)


def batches(of: MultiCropDataModule) -> list[Any]:
    return [of.on_after_batch_transfer(batch, 0) for batch in of.train_dataloader()]


def numbers(crop: Tensor) -> list[int]:
    return (crop[..., 0, 0, 0] * 255 / STEP).round().int().tolist()


@pytest.mark.parametrize("backend", ["pil", "cpu", "device"])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_image_has_its_label(backend: str, workers: int, tmp_path: Path) -> None:
    found = batches(module(folder(tmp_path), backend=backend, num_workers=workers))
    assert len(found) == 6
    for batch in found:
        assert isinstance(batch, LabeledCrops)
        assert batch.labels.dtype == torch.int64
        assert [crop.shape[-1] for crop in batch.crops] == [8, 8, 4, 4]
        for crop in batch.crops:
            assert batch.labels.tolist() == [class_of(number) for number in numbers(crop)]
    assert sorted(number for batch in found for number in numbers(batch.crops[0])) == list(range(24))


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
@pytest.mark.parametrize("backend", ["pil", "device"])
def test_the_replacement_of_a_broken_image_has_its_own_label(backend: str, cache: str, tmp_path: Path) -> None:
    """Pictures 7 and 15 are the last ones of classes a and b: those after them are of the next class."""
    root = folder(tmp_path / "images", broken=(3, 7, 15))
    options = {"cache": cache, "cache_dir": str(tmp_path / "cache")}
    found = batches(module(root, backend=backend, **options))
    for batch in found:
        assert batch.labels.tolist() == [class_of(number) for number in numbers(batch.crops[0])]
    seen = sorted(number for batch in found for number in numbers(batch.crops[0]))
    assert seen == sorted([n for n in range(24) if n not in (3, 7, 15)] + [4, 8, 16])


@pytest.mark.parametrize("backend", ["pil", "device"])
def test_other_methods_see_no_label(backend: str, tmp_path: Path) -> None:
    found = batches(module(folder(tmp_path), backend=backend, labels=False))
    assert all(isinstance(batch, list) and torch.is_tensor(batch[0]) for batch in found)


def test_images_in_a_batch() -> None:
    crops = [torch.zeros(5, 3, 8, 8)] * 2
    assert num_images(crops) == num_images(LabeledCrops(crops, torch.zeros(5))) == 5


# ------------------------------------------------------------------------------------------------------------ method


def slow_loss(logits_VBC: Tensor, labels: list[int], *, smoothing: float) -> Tensor:
    """Crop by crop: the target has 1 - s on the label and s spread over all classes."""
    terms = []
    for logits_BC in logits_VBC:
        for logits_C, label in zip(logits_BC, labels, strict=True):
            if label >= 0:
                target_C = torch.full_like(logits_C, smoothing / len(logits_C))
                target_C[label] += 1 - smoothing
                terms.append(-(target_C * F.log_softmax(logits_C, dim=0)).sum())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("labels", [[0, 2, 1, 1, 0, 2, 2, 0], [0, -1, 1, -1, 0, 2, -1, 0]])
def test_loss_and_gradient(labels: list[int], smoothing: float) -> None:
    method, (crops,) = tiny_methods.build("supervised", label_smoothing=smoothing).double(), tiny.batches(1)
    own = dict(method.named_parameters())
    leaves = {name: value.detach().clone().requires_grad_() for name, value in own.items()}
    student = oracles_methods.part(leaves, "student")
    features_VBD = torch.stack([oracles_methods.crop_features(student, crop) for crop in crops])
    expected = slow_loss(features_VBD @ student["head.weight"].T + student["head.bias"], labels, smoothing=smoothing)
    ours = method.loss(LabeledCrops(crops, torch.tensor(labels)))
    torch.testing.assert_close(ours, expected, **EXACT)
    wanted = torch.autograd.grad(expected, list(leaves.values()))
    for name, gradient, other in zip(own, torch.autograd.grad(ours, list(own.values())), wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-11, msg=name)


def test_images_without_a_label_do_not_count() -> None:
    method, (crops,) = tiny_methods.build("supervised").double(), tiny.batches(1)
    labels = torch.tensor([0, 1, 2, 0, -1, -1, -1, -1])
    some = method.loss(LabeledCrops(crops, labels))
    torch.testing.assert_close(some, method.loss(LabeledCrops([crop[:4] for crop in crops], labels[:4])), **EXACT)
    none = method.loss(LabeledCrops(crops, torch.full((8,), -1)))
    none.backward()
    assert none.item() == 0
    assert not any(parameter.grad.any() for parameter in method.parameters())


def test_a_fit_learns() -> None:
    method, rows = tiny_methods.build("supervised", label_smoothing=0.0), []
    method.metric_listeners.append(lambda reading: rows.append(reading.values["train/top1"]))
    seen = tiny_methods.fit(method, tiny_methods.labeled(tiny.batches(4)), max_epochs=30, log_every_n_steps=1)
    assert sum(seen.losses[-4:]) < 0.6 * sum(seen.losses[:4])
    assert len(rows) == 120
    assert sum(rows[-4:]) / 4 > 80 > sum(rows[:2]) / 2
    assert method.evaluated is method.student
    assert {name.split(".")[0] for name in method.state_dict()} == {"student"}


# ----------------------------------------------------------------------------------------------------------- refused


def test_a_stream_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "images-0.tar").touch()
    words = ["method=supervised", "data=webdataset", f"data.shards={tmp_path}/images-0.tar", "data.images=40"]
    sentence = sentence_for(*words, "callbacks.knn.enabled=false", output_dir=tmp_path / "run")
    assert "method=supervised reads labels by index, which streams do not support" in sentence


def test_images_without_classes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for index in range(20):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(tmp_path / "in" / f"{index}.png")
    words = ["data=folder", f"data.path={tmp_path}/in", "data.batch_size_per_device=8"]
    off = "callbacks.knn.enabled=false"
    sentence = sentence_for("method=supervised", *words, off, output_dir=tmp_path / "run")
    assert "method=supervised needs labels of at least two classes, but this data has 0" in sentence
    assert sentence_for("method=byol", *words, off, output_dir=tmp_path / "run") == ""
