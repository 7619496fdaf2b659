"""`eval=linear`, compared with a loop that is written from the definition of the original."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from evaluation_tools import MEAN, STD, timm_network, tiny_network, tiny_task
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop, functional

from dino_lightning.config import BuiltinData, DataConfig, FolderData, LinearEval
from dino_lightning.data.batches import crop_seed
from dino_lightning.data.sources.base import Splits, Subset
from dino_lightning.errors import UserError
from dino_lightning.evaluation.classification.classifiers import LinearClassifier
from dino_lightning.evaluation.classification.linear import evaluate
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.models.frozen import FrozenNetwork

TF: Any = functional  # its annotations know tensors only
SEED, CLASSES, WIDTH = 5, 12, 32
BUILTIN = BuiltinData(train_images=40, val_images=36, num_workers=0)
FEATURES = [(2, False), (1, True), (1, False)]


def config(**changes: Any) -> LinearEval:
    return LinearEval(**{"n_last_blocks": 2, "epochs": 2, "batch_size_per_device": 16, "lr": 0.5, **changes})


def run(task: Task, **changes: Any) -> dict[str, Result]:
    return {result.metric: result for result in evaluate(config(**changes), task)}


def weights(results: dict[str, Result]) -> dict[str, Tensor]:
    return torch.load(results["top1"].details["classifier"], weights_only=True)["state_dict"]


def slow_features(network: FrozenNetwork, image: Tensor, *, n: int, avgpool: bool) -> Tensor:
    """Features of one image, value by value."""
    vit = cast(Any, network.backbone)
    with torch.no_grad():
        outputs = vit.get_intermediate_layers(image[None], n=n, norm=True, return_prefix_tokens=True)
    cls = [value for _, prefix in outputs for value in prefix[0, 0].tolist()]
    if not avgpool:
        return torch.tensor(cls)
    mean = outputs[-1][0][0].double().mean(dim=0).tolist()
    assert n == 1
    return torch.tensor([value for pair in zip(cls, mean, strict=True) for value in pair])


def slow_crop(image: Any) -> Tensor:
    top, left, height, width = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
    image = TF.resized_crop(image, top, left, height, width, [32, 32], InterpolationMode.BILINEAR)
    if torch.rand(1) < 0.5:
        image = TF.hflip(image)
    return TF.normalize(TF.to_tensor(image), MEAN, STD)


def slow_training(task: Task, *, epochs: int, batch_size: int, lr: float, n: int, avgpool: bool) -> list[Tensor]:
    """Weight (C, D) and bias (C,) in float64 by the definition of momentum SGD on the mean cross-entropy."""
    images: Any = task.splits.train
    head = LinearClassifier(WIDTH * (n + avgpool), CLASSES, seed=SEED).linear
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for epoch in range(epochs):
        rate = lr * batch_size / 256 * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED + epoch)).tolist()
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            gradient = [torch.zeros_like(weight), torch.zeros_like(bias)]
            for index in batch:
                torch.manual_seed(crop_seed(SEED, epoch, index))
                crop = slow_crop(Image.fromarray(images.read(index)))
                x = slow_features(task.network, crop, n=n, avgpool=avgpool).double()
                error = (weight @ x + bias).softmax(0)
                error[images.labels[index]] -= 1
                gradient[0] += error[:, None] * x / len(batch)
                gradient[1] += error / len(batch)
            velocity = [0.9 * v + g for v, g in zip(velocity, gradient, strict=True)]
            weight, bias = weight - rate * velocity[0], bias - rate * velocity[1]
    return [weight, bias]


@pytest.mark.parametrize(("n", "avgpool"), FEATURES)
@pytest.mark.slow_after_first(2)
def test_weights_equal_the_definition(n: int, avgpool: bool, tmp_path: Path) -> None:
    task = tiny_task(tmp_path, tiny_network(), data=BUILTIN, seed=SEED)
    results = run(task, n_last_blocks=n, avgpool=avgpool)
    expected = slow_training(task, epochs=2, batch_size=16, lr=0.5, n=n, avgpool=avgpool)
    for found, right in zip(weights(results).values(), expected, strict=True):
        assert (found - right).abs().max() < 1e-6
        assert right.abs().max() > 0.005


def test_weights_start_as_in_the_original() -> None:
    before = torch.get_rng_state()
    linear = LinearClassifier(384, 1000, seed=SEED).linear
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert abs(linear.weight.mean().item()) < 1e-4
    assert not linear.bias.any()
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_is_another_training(tmp_path: Path) -> None:
    task = tiny_task(tmp_path, tiny_network(), data=BUILTIN, seed=SEED + 1)
    expected = slow_training(task, epochs=2, batch_size=16, lr=0.5, n=2, avgpool=False)
    assert (weights(run(task))["module.linear.weight"] - expected[0]).abs().max() > 1e-3


def slow_accuracy(task: Task, weight: Tensor, bias: Tensor, *, n: int, avgpool: bool) -> list[float]:
    images: Any = task.splits.val
    size, resize = task.network.size, task.network.resize
    right = [0, 0]
    for index in range(len(images)):
        image = TF.resize(Image.fromarray(images.read(index)), [resize], InterpolationMode.BICUBIC)
        view = TF.normalize(TF.to_tensor(TF.center_crop(image, [size])), MEAN, STD)
        logits = (weight @ slow_features(task.network, view, n=n, avgpool=avgpool) + bias).tolist()
        order = sorted(range(CLASSES), key=lambda c: -logits[c])
        right[0] += order[0] == images.labels[index]
        right[1] += images.labels[index] in order[:5]
    return [100 * count / len(images) for count in right]


@pytest.mark.parametrize(("n", "avgpool"), FEATURES)
def test_a_published_classifier_is_tested(n: int, avgpool: bool, tmp_path: Path) -> None:
    weight, bias = torch.randn(CLASSES, WIDTH * (n + avgpool)), torch.randn(CLASSES)
    torch.save({"state_dict": {"module.linear.weight": weight, "module.linear.bias": bias}}, tmp_path / "x.pth")
    task = tiny_task(tmp_path, tiny_network(), data=BUILTIN)
    results = run(task, n_last_blocks=n, avgpool=avgpool, classifier=str(tmp_path / "x.pth"))
    found = [results[metric].value for metric in ("top1", "top5")]
    assert found == pytest.approx(slow_accuracy(task, weight, bias, n=n, avgpool=avgpool))
    assert set(results) == {"top1", "top5"}
    assert results["top1"].main


def test_results_belong_to_the_file(tmp_path: Path) -> None:
    task = tiny_task(tmp_path, tiny_network(), data=BUILTIN, seed=SEED)
    results = run(task, epochs=5, val_every_n_epochs=2)
    tested = results["top1"].details["epochs"]
    assert [entry["epoch"] for entry in tested] == [1, 3, 5]
    by_hand = slow_accuracy(task, *weights(results).values(), n=2, avgpool=False)
    assert [results["top1"].value, results["top5"].value] == pytest.approx(by_hand)
    assert results["top1_best_epoch"].value == max(entry["top"][0] for entry in tested)
    assert "test images" in results["top1_best_epoch"].details["chosen_on"]
    again = run(task, epochs=5, val_every_n_epochs=2, classifier=results["top1"].details["classifier"])
    assert again["top1"].value == results["top1"].value


def interrupt_after(task: Task, units: int) -> None:
    @contextmanager
    def progress(what: str, *, total: int) -> Iterator[Callable[[int], None]]:
        left = units

        def advance(done: int) -> None:
            nonlocal left
            left -= done
            if what == "Linear classifier" and left < 0:
                raise KeyboardInterrupt

        yield advance

    cast(Any, task.context).progress = progress


def test_a_resumed_evaluation_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = run(tiny_task(tmp_path / "a", tiny_network(), data=BUILTIN, seed=SEED), epochs=3)
    task = tiny_task(tmp_path / "b", tiny_network(), data=BUILTIN, seed=SEED)
    interrupt_after(task, 7)  # an epoch has three steps, so this is in the middle of the third epoch
    with pytest.raises(KeyboardInterrupt):
        run(task, epochs=3)
    (file,) = (task.output / "linear").iterdir()
    assert torch.load(file, weights_only=True)["epoch"] == 2
    torch.manual_seed(99)
    said: list[str] = []
    again = tiny_task(tmp_path / "b", tiny_network(), data=BUILTIN, seed=SEED)
    cast(Any, again.context).say = said.append
    resumed = run(again, epochs=3)
    assert "after epoch 2 of 3" in said[0]
    for one, other in zip(weights(resumed).values(), weights(whole).values(), strict=True):
        assert torch.equal(one, other)
    for metric, result in whole.items():
        assert resumed[metric].value == result.value
    # Other settings or weights have their own file, so they do not resume from this one.
    assert len(said) == 1
    run(again, epochs=3, lr=0.1)
    run(tiny_task(tmp_path / "b", tiny_network(seed=1), data=BUILTIN, seed=SEED), epochs=3)
    assert len(said) == 1
    assert len(list((task.output / "linear").iterdir())) == 3


def test_a_network_without_blocks(tmp_path: Path) -> None:
    task = tiny_task(tmp_path, timm_network("resnet10t"), data=BUILTIN)
    results = run(task, n_last_blocks=1, epochs=1)
    assert weights(results)["module.linear.weight"].shape == (CLASSES, 512)


def write_images(folder: Path, *, broken: int) -> FolderData:
    """8 training images and 4 to test, of 2 classes; `broken` of the training images are cut off."""
    for split, count in (("train", 4), ("val", 2)):
        for name, color in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40), color).save(folder / split / name / f"{i}.png")
    for file in sorted((folder / "train").rglob("*.png"))[:broken]:
        file.write_bytes(file.read_bytes()[:40])
    return FolderData(path=str(folder), num_workers=0, max_bad_share=1, cache_dir=str(folder / "cache"))


@pytest.mark.parametrize("broken", [1, 8])
def test_broken_images_are_named_and_left_out(broken: int, tmp_path: Path) -> None:
    data = write_images(tmp_path / "images", broken=broken)
    results = run(tiny_task(tmp_path, tiny_network(), data=data), batch_size_per_device=1)
    assert len((tmp_path / "out" / "bad_images_train.txt").read_text().splitlines()) == broken
    assert math.isfinite(results["top1"].details["epochs"][0]["train_loss"])
    assert torch.isfinite(weights(results)["module.linear.weight"]).all()
    assert "top5" not in results  # two classes


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "does not exist"),
        (b"nonsense", "cannot be read"),
        ({"state_dict": {"head.weight": torch.zeros(2)}}, "expected the keys 'module.linear.weight'"),
        ({"module.linear.weight": torch.zeros(1000, 64), "module.linear.bias": torch.zeros(1000)}, "1000 classes"),
        ({"linear.weight": torch.zeros(12, 384), "linear.bias": torch.zeros(12)}, "takes 384 features, but"),
        ({"linear.weight": torch.zeros(12, 64), "linear.bias": torch.zeros(3)}, "does not match its bias"),
    ],
)
def test_wrong_classifiers_are_refused(content: Any, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=expected):
        run(tiny_task(tmp_path, tiny_network(), data=BUILTIN), classifier=str(path))


def changed(task: Task, **changes: Any) -> Task:
    """With validation images of other attributes."""
    val: Any = Subset(cast(Any, task.splits.val), indices=torch.arange(20).numpy())
    for name, value in changes.items():
        setattr(val, name, value)
    task.__dict__["splits"] = Splits(task.splits.train, val, None)
    return task


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (lambda task: changed(task, labels=None), "validation images have no labels"),
        (
            lambda task: changed(task, classes=["cat"]),
            r"among the training images but not among the validation images \(12 and 1",
        ),
        (lambda task: changed(task, labels=torch.full((20,), -1).numpy()), "none of the validation images has a label"),
    ],
)
def test_data_that_cannot_be_classified(wrong: Callable[[Task], Task], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=expected):
        run(wrong(tiny_task(tmp_path, tiny_network(), data=BUILTIN)))


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval.n_last_blocks=3: vit0 has 2 blocks; expected 1 to 2"):
        run(tiny_task(tmp_path, tiny_network(), data=BUILTIN), n_last_blocks=3)
    with pytest.raises(UserError, match=r"resnet10t is not a ViT .* set eval.n_last_blocks=1"):
        run(tiny_task(tmp_path, timm_network("resnet10t"), data=BUILTIN))
    flat: DataConfig = write_images(tmp_path / "images", broken=0)
    flat.path = str(tmp_path / "images" / "train" / "red")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="training images have no labels"):
        run(tiny_task(tmp_path, tiny_network(), data=flat))
    flat.path, flat.holdout = str(tmp_path / "images" / "train"), 0.0  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="no validation images"):
        run(tiny_task(tmp_path, tiny_network(), data=flat))
