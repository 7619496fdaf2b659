"""Finetuning: compared with a hand-written loop, after an interruption, and on two ranks."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from evaluation_tools import timm_network, tiny_network, tiny_task
from lightning import Fabric
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from dino_lightning.checkpoints import load_network
from dino_lightning.config import BuiltinData, FinetuneEval, FolderData
from dino_lightning.errors import UserError
from dino_lightning.evaluation.classification import finetune, training_images
from dino_lightning.evaluation.classification.finetune import Finetuning
from dino_lightning.evaluation.classification.finetune_recipe import FinetuneAugmentation, Targets, set_learning_rate
from dino_lightning.evaluation.classification.splits import open_labeled
from dino_lightning.evaluation.context import EvalContext, Result, Task
from dino_lightning.models.frozen import FrozenNetwork

DEPTH, CLASSES = 2, 8
IMAGES = BuiltinData(train_images=52, val_images=21, num_workers=0)
PLAIN: dict[str, Any] = {
    "batch_size_per_device": 16,
    "epochs": 2,
    "warmup_epochs": 0,
    "lr": 0.02,
    "drop_path_rate": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "auto_augment": None,
}
"""Without random operations except crops and erasing."""


def network(*, seed: int = 0, **more: Any) -> FrozenNetwork:
    shape: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": DEPTH, "num_heads": 2}
    return timm_network("vit_tiny_patch16_224", seed=seed, **shape, **more)


def training(folder: Path, *, net: FrozenNetwork | None = None, data: Any = IMAGES, **config: Any) -> Finetuning:
    task = tiny_task(folder, net or network(), data=data)
    return Finetuning(FinetuneEval(**{**PLAIN, **config}), task, open_labeled(task))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor], *, atol: float = 0.0) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(
            tensor, right[name], atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_rates_and_decays_of_each_parameter(tmp_path: Path) -> None:
    run = training(tmp_path, layer_decay=0.5, weight_decay=0.3)
    set_learning_rate(run.adamw, 0.08)
    groups = {id(p): group for group in run.adamw.param_groups for p in group["params"]}
    for name, parameter in run.model.named_parameters():
        if name.startswith("head."):
            below_top = 0
        elif name.startswith("blocks."):
            below_top = DEPTH - int(name.split(".")[1])
        elif name.startswith("norm."):  # with the last block
            below_top = 1
        else:
            below_top = DEPTH + 1
        group = groups.pop(id(parameter))
        assert group["lr"] == pytest.approx(0.08 * 0.5**below_top), name
        decays = parameter.ndim > 1 and name not in ("pos_embed", "cls_token")
        assert group["weight_decay"] == (0.3 if decays else 0.0), name
    assert not groups


def test_schedule(tmp_path: Path) -> None:
    """Linear from 0, then half a cosine, for 16 of 512 images."""
    run = training(tmp_path, epochs=5, warmup_epochs=2, lr=0.64, lr_end=0.001)
    assert len(run.loader) == 3
    top = 0.64 * 16 / 512
    warm = [top * i / 5 for i in range(6)]
    cosine = [0.001 + (top - 0.001) * (1 + math.cos(math.pi * i / 9)) / 2 for i in range(9)]
    assert [run.lr(step) for step in range(15)] == pytest.approx(warm + cosine)


def smoothed_cross_entropy(logits_BK: Tensor, labels_B: Tensor, *, smoothing: float) -> Tensor:
    total = torch.zeros(())
    for logits, label in zip(logits_BK, labels_B, strict=True):
        log_p = logits - logits.exp().sum().log()
        total = total - (1 - smoothing) * log_p[label] - smoothing / len(logits) * log_p.sum()
    return total / len(labels_B)


def test_steps_equal_a_hand_written_loop(tmp_path: Path) -> None:
    run = training(tmp_path, epochs=1, layer_decay=0.5, weight_decay=0.3, label_smoothing=0.2, ema_decay=0.7)
    model = copy.deepcopy(run.model).train()
    scales = {id(p): (g["lr_scale"], g["weight_decay"]) for g in run.adamw.param_groups for p in g["params"]}
    settings = [scales[id(parameter)] for parameter in run.model.parameters()]
    averaged = weights_of(model)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    for step, (images_BCHW, labels_B) in enumerate(run.loader.epoch(0)):
        loss = smoothed_cross_entropy(model(images_BCHW), labels_B, smoothing=0.2)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        rate = 1e-6 + (0.02 * 16 / 512 - 1e-6) * (1 + math.cos(math.pi * step / 3)) / 2
        with torch.no_grad():
            for p, g, (m, v), (scale, decay) in zip(model.parameters(), gradients, moments, settings, strict=True):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                direction = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                p.sub_(rate * scale * (direction + decay * p))
        averaged = {name: 0.7 * averaged[name] + 0.3 * tensor for name, tensor in model.state_dict().items()}
    before = weights_of(run.model)
    run.run()
    assert_equal(weights_of(run.model), weights_of(model), atol=1e-6)
    assert_equal(weights_of(cast(Any, run.ema).module), averaged, atol=1e-6)
    assert max((before[name] - tensor).abs().max() for name, tensor in weights_of(model).items()) > 1e-4


def test_the_network_starts_from_the_checkpoint(tmp_path: Path) -> None:
    net, images_BCHW = network(seed=4), torch.randn(3, 3, 32, 32)
    model: Any = training(tmp_path, net=net).model.eval()
    features_BD = model.forward_head(model.forward_features(images_BCHW), pre_logits=True)
    torch.testing.assert_close(features_BD, net.backbone(images_BCHW), atol=0, rtol=0)
    torch.testing.assert_close(model(images_BCHW), features_BD @ model.head.weight.T, atol=1e-9, rtol=1e-4)
    assert model.head.weight.std() < 1e-4
    fresh: Any = training(tmp_path, net=replace(net, trained=False)).model
    assert 0.015 < fresh.head.weight.std() < 0.025
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in net.backbone.parameters())


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("batch", [1, 6, 7])
def test_mixed_targets(mixup: float, cutmix: float, batch: int) -> None:
    config = FinetuneEval(mixup=mixup, cutmix=cutmix, label_smoothing=0.1)
    mix = Targets(config, classes=CLASSES, seed=3)
    images_BCHW, labels_B = torch.arange(batch).float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8), torch.arange(batch)
    state = cast(Any, np.random.get_state())[1].tolist()
    drawn = [mix(images_BCHW.clone(), labels_B, step=step) for step in (5, 5, *range(20))]
    assert cast(Any, np.random.get_state())[1].tolist() == state
    for left, right in zip(drawn[0], drawn[1], strict=True):
        assert torch.equal(left, right)
    for mixed_BCHW, targets_BK in drawn:
        torch.testing.assert_close(targets_BK.sum(dim=1), torch.ones(batch))
        for b in range(batch):
            # Image b has the value b, so its mean is the share that remains, which its target must have.
            other = batch // 2 * 2 - 1 - b if b < batch // 2 * 2 else b
            expected = torch.full((CLASSES,), 0.1 / CLASSES)
            share = 1.0 if other == b else float((mixed_BCHW[b].mean() - other) / (b - other))
            expected[b] += 0.9 * share
            expected[other] += 0.9 * (1 - share)
            torch.testing.assert_close(targets_BK[b], expected, atol=1e-5, rtol=0)
    if batch > 1:
        assert len({float(targets_BK[0, 0]) for _, targets_BK in drawn[2:]}) > 5


FULL: dict[str, Any] = {"epochs": 3, "mixup": 0.8, "cutmix": 1.0, "auto_augment": "rand-m9-mstd0.5-inc1"}
FULL |= {"drop_path_rate": 0.4, "ema_decay": 0.8, "repeated_augmentation": 3, "warmup_epochs": 1}


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = training(tmp_path / "whole", **FULL)
    history = whole.run()
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    taken = Finetuning._step

    def until_step_7(self: Finetuning, *args: Any, step: int) -> Tensor:
        if step == 7:
            raise KeyboardInterrupt
        return taken(self, *args, step=step)

    with monkeypatch.context() as patch:
        patch.setattr(Finetuning, "_step", until_step_7)
        with pytest.raises(KeyboardInterrupt):
            training(tmp_path / "parts", **FULL).run()
    torch.manual_seed(99)
    rest = training(tmp_path / "parts", **FULL)
    assert rest.epoch == 2
    assert rest.run() == history
    for one, other in zip(whole._models().values(), rest._models().values(), strict=True):
        assert_equal(weights_of(one), weights_of(other))
    lines = (tmp_path / "parts/out/finetune/epochs.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history
    with pytest.raises(UserError, match=r"eval\.lr=0\.5: .*last\.ckpt belongs to a training with eval\.lr=0\.02"):
        training(tmp_path / "parts", **FULL, lr=0.5)
    checkpoint = tmp_path / "parts/out/finetune/last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"last\.ckpt is not a complete checkpoint"):
        training(tmp_path / "parts", **FULL)


def test_results_and_exported_weights(tmp_path: Path) -> None:
    task = tiny_task(tmp_path, replace(network(), description={"resize": 0, "size": 0, "x": 1}), data=IMAGES)
    config = FinetuneEval(**{**PLAIN, "ema_decay": 0.5, "val_every_n_epochs": 2, "epochs": 3})
    results = {result.metric: result for result in finetune.evaluate(config, task)}
    assert [result.metric for result in results.values() if result.main] == ["top1", "top5", "top1_ema", "top5_ema"]
    details = results["top1"].details
    assert ["accuracy" in entry for entry in details["epochs"]] == [False, True, True]
    tested = [entry["accuracy"]["top1"] for entry in details["epochs"] if "accuracy" in entry]
    assert results["top1"].value == tested[-1]
    assert results["top1_best_epoch"].value == max(tested)
    assert "biased" in results["top1_best_epoch"].details["chosen_on"]
    assert details["val_images"] == 21
    shape: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": DEPTH, "num_heads": 2}
    classes = open_labeled(task).classes
    model = timm.create_model("vit_tiny_patch16_224", num_classes=len(classes), **shape).eval()
    with safe_open(details["weights"], framework="pt") as file:
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        metadata = file.metadata()
    assert json.loads(metadata["classes"]) == classes
    assert metadata["classifier"] == "head"
    assert json.loads(metadata["network"]) == {"resize": 36, "size": 32, "x": 1}
    right = 0
    view = finetune.center_view(task.network)
    val = open_labeled(task).val
    for i in range(len(val)):
        image = Image.fromarray(cast(np.ndarray, val.read(i)))
        right += int(model(view(image)[None]).argmax() == cast(np.ndarray, val.labels)[i])
    assert 100 * right / 21 == pytest.approx(results["top1"].value)
    again = {result.metric: result.value for result in finetune.evaluate(config, task)}
    assert again == {metric: result.value for metric, result in results.items()}


def test_the_finetuned_network_loads_as_a_checkpoint(tmp_path: Path) -> None:
    net = replace(load_network("untrained:vit_micro"), trained=True)
    run = training(tmp_path, net=net, image_size=32, epochs=1, ema_decay=0.9)
    run.run()
    for name, model in zip(run.export().values(), run._models().values(), strict=True):
        found = load_network(name)
        assert_equal(weights_of(found.backbone), {k: v for k, v in weights_of(model).items() if k[:5] != "head."})
        assert (found.resize, found.size, found.mean) == (round(32 * net.resize / net.size), 32, net.mean)


def test_broken_images_are_left_out_and_named(tmp_path: Path) -> None:
    for split in ("train", "val"):
        path = tmp_path
        for number in range(8):
            path = tmp_path / "data" / split / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.randint(0, 255, (30, 40, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:100])
    data = FolderData(path=str(tmp_path / "data"), num_workers=0, max_bad_share=1.0)
    config = FinetuneEval(**{**PLAIN, "batch_size_per_device": 1, "mixup": 0.8})
    results: list[Result] = list(finetune.evaluate(config, tiny_task(tmp_path, network(), data=data)))
    assert [result.metric for result in results] == ["top1", "top1_best_epoch"]
    assert results[0].details["val_images"] == 7
    assert math.isfinite(results[0].details["epochs"][-1]["train_loss"])
    for split in ("train", "val"):
        assert "7.png" in (tmp_path / "out" / f"bad_images_{split}.txt").read_text()


def test_posterize_with_no_bits_is_black() -> None:
    """Newer versions of Pillow refuse it, and DeiT's policy asks for it."""
    augmentation: Any = FinetuneAugmentation(FinetuneEval(), network(), size=32)
    policy = augmentation.transform.transforms[2]
    posterize = next(operator for operator in policy.ops if operator.name == "PosterizeIncreasing")
    posterize.magnitude, posterize.magnitude_std, posterize.prob = 10, 0, 1.0
    assert not np.asarray(posterize(Image.new("RGB", (4, 4), (255, 9, 99)))).any()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("repeats", [1, 3])
def test_order_of_repeated_augmentation(ranks: int, repeats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks take turns: the image of each sample, and the number of its augmentation."""
    monkeypatch.setattr(training_images, "world_size", lambda: ranks)
    by_rank: list[list[tuple[int, int]]] = []
    for number in range(ranks):
        monkeypatch.setattr(training_images, "rank", lambda number=number: number)
        order = training_images._Order(10, batch_size=4, seed=5, drop_last=False, repeats=repeats)
        order.epoch = 6
        by_rank.append([key for batch in order for key in batch])
    samples = [sample for round_ in zip(*by_rank, strict=True) for sample in round_]
    shuffled = torch.randperm(10, generator=torch.Generator().manual_seed(5 + 6)).tolist()
    expected = [(6 * repeats + again, image) for image in shuffled for again in range(repeats)]
    assert samples == (expected + expected)[: len(samples)]
    assert len(samples) == math.ceil(10 / ranks) * ranks


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"batch_size_per_device": 53},
        "eval.batch_size_per_device=53: 52 labeled .* are fewer than one batch; set it to at most 52",
    ),
    ({"auto_augment": "rend-m9"}, "eval.auto_augment=rend-m9: timm .* rejects this policy"),
    ({"auto_augment": "rand-m9-z3"}, "eval.auto_augment=rand-m9-z3: timm .* rejects this policy"),
]


@pytest.mark.parametrize(("config", "sentence"), WRONG, ids=[str(config) for config, _ in WRONG])
def test_wrong_settings(config: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        training(tmp_path, **config)
    assert not (tmp_path / "out").exists()


def test_a_warm_up_longer_than_the_training() -> None:
    with pytest.raises(UserError, match="eval.warmup_epochs=3 is longer than eval.epochs=2"):
        finetune.check(FinetuneEval(warmup_epochs=3, epochs=2), BuiltinData())


def test_two_channels_take_no_policy(tmp_path: Path) -> None:
    net = replace(tiny_network(), mean=[0.5, 0.5], std=[0.2, 0.2])
    with pytest.raises(UserError, match=r"eval.auto_augment=3a: timm's policies do not support images with 2 channels"):
        FinetuneAugmentation(FinetuneEval(auto_augment="3a"), net, size=32)
    plain = FinetuneAugmentation(FinetuneEval(auto_augment=None, random_erasing=0), net, size=32)
    assert plain(torch.full((2, 40, 50), 255, dtype=torch.uint8)).flatten().tolist() == pytest.approx([2.5] * 2048)


def test_a_nan_loss_stops_the_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.lr=1e\+30: the loss is NaN or infinite in epoch 1"):
        training(tmp_path, lr=1e30).run()
    assert not (tmp_path / "out/finetune").exists()


def _rank(fabric: Fabric, folder: str, batch: int) -> None:
    torch.set_num_threads(1)
    task = Task(network(), IMAGES, EvalContext(fabric, show_progress=False), Path(folder) / "out")
    run = Finetuning(FinetuneEval(**{**PLAIN, "batch_size_per_device": batch}), task, open_labeled(task))
    torch.save({"history": run.run(), "weights": weights_of(run.model)}, f"{folder}/{fabric.global_rank}.pt")


def test_two_ranks_train_like_one(tmp_path: Path) -> None:
    Fabric(accelerator="cpu", devices=2, strategy="ddp_fork").launch(cast(Any, _rank), str(tmp_path), 8)
    left, right = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_equal(left["weights"], right["weights"])
    assert left["history"] == right["history"]
    one = training(tmp_path / "one")
    history = one.run()
    assert_equal(left["weights"], weights_of(one.model), atol=1e-5)
    assert [entry["train_loss"] for entry in left["history"]] == pytest.approx([e["train_loss"] for e in history])
    assert [entry["val_images"] for entry in left["history"]] == [21, 21]
    assert left["history"][-1]["accuracy"] == history[-1]["accuracy"]
