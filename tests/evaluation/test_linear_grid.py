"""`eval=linear_grid`: classifiers are trained independently, and validation images do not influence the choice."""

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation_tools import timm_network, tiny_network, tiny_task
from torch import Tensor, nn

from dino_lightning.config import BuiltinData, LinearEval, LinearGridEval
from dino_lightning.data.sources.base import Splits, Subset, held_out
from dino_lightning.errors import UserError
from dino_lightning.evaluation.classification import linear
from dino_lightning.evaluation.classification import linear_grid as linear_grid
from dino_lightning.evaluation.classification.classifiers import LinearClassifier, accuracy, count_correct
from dino_lightning.evaluation.classification.linear_heads import LinearHeads, TokenLayout, train
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.images import ViewedImages, center_view
from dino_lightning.evaluation.features.spec import FeatureSpec
from dino_lightning.models.tokens import linear_features

CPU = torch.device("cpu")
BUILTIN = BuiltinData(train_images=150, val_images=48, num_workers=0)
CLS, BOTH, TWO = FeatureSpec(1), FeatureSpec(1, avgpool=True), FeatureSpec(2)


def run(task: Task, **changes: Any) -> dict[str, Result]:
    settings = {"n_last_blocks": [1, 2], "lrs": [0.03, 0.3, 3.0], "epochs": 4, "classifier_batch_size": 32, **changes}
    return {result.metric: result for result in linear_grid.evaluate(LinearGridEval(**settings), task)}


def listened(task: Task) -> tuple[Task, list[str]]:
    """The task, and the messages that it will print."""
    said: list[str] = []
    cast(Any, task.context).say = said.append
    return task, said


def alone(
    x_ND: Tensor, labels: Tensor, *, lr: float, epochs: int, batch_size: int, classes: int, seed: int
) -> nn.Linear:
    """One classifier, trained by PyTorch's optimizer."""
    head = LinearClassifier(x_ND.shape[1], classes, seed=seed).linear
    optimizer = torch.optim.SGD(head.parameters(), lr, momentum=0.9)
    starts = range(0, len(x_ND), batch_size)
    for epoch in range(epochs):
        order = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(seed + epoch))
        for number, start in enumerate(starts):
            done = (epoch * len(starts) + number) / (epochs * len(starts))
            rate = lr * min(batch_size, len(x_ND)) / 256 * (1 + math.cos(math.pi * done)) / 2
            optimizer.param_groups[0]["lr"] = rate
            rows = order[start : start + batch_size]
            optimizer.zero_grad()
            F.cross_entropy(head(x_ND[rows]), labels[rows]).backward()
            optimizer.step()
    return head


@pytest.mark.parametrize("batch_size", [16, 1000])
def test_classifiers_are_trained_independently(batch_size: int) -> None:
    tokens, labels = torch.randn(100, 18), torch.randint(0, 5, (100,))
    layout, lrs, rows = TokenLayout(6, n=2, mean_patch=True), [0.1, 1.0, 10.0], torch.arange(3, 93)
    kinds = {TWO: tokens[:, :12], CLS: tokens[:, 6:12]}
    heads = {choice: LinearHeads(x.shape[1], 5, lrs=lrs, seed=7, device=CPU) for choice, x in kinds.items()}
    setting: dict[str, Any] = {"epochs": 3, "batch_size": batch_size, "seed": 7}
    train(heads, tokens, labels, indices=rows, layout=layout, device=CPU, advance=lambda _: None, **setting)
    for choice, x in kinds.items():
        for i, lr in enumerate(lrs):
            right = alone(x[rows], labels[rows], lr=lr, classes=5, **setting)
            torch.testing.assert_close(heads[choice].weight_LCD[i], right.weight.data, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(heads[choice].bias_LC[i], right.bias.data, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(heads[choice].logits(x)[i], right(x).data, rtol=1e-4, atol=1e-4)
    assert heads[TWO].weight_LCD.std(dim=0).mean() > 0.01  # the rates do make a difference


def test_a_divergent_classifier_does_not_affect_the_others() -> None:
    tokens, labels = 1e20 * torch.randn(64, 8), torch.randint(0, 3, (64,))
    both, one = (LinearHeads(8, 3, lrs=lrs, seed=0, device=CPU) for lrs in ([1e-22, 1e30], [1e-22]))
    for heads in (both, one):
        train(
            {CLS: heads},
            tokens,
            labels,
            indices=torch.arange(64),
            layout=TokenLayout(8, n=1, mean_patch=False),
            epochs=2,
            batch_size=16,
            seed=0,
            device=CPU,
            advance=lambda _: None,
        )
    assert torch.equal(both.weight_LCD[0], one.weight_LCD[0])
    assert not torch.isfinite(both.weight_LCD[1]).all()
    assert accuracy(both.logits, tokens, labels, topk=(1,), device=CPU)[1] < 50


@pytest.mark.parametrize("widest", [CLS, BOTH, TWO, FeatureSpec(n_last_blocks=2, avgpool=True)])
def test_tokens_contain_every_choice_of_features(widest: FeatureSpec) -> None:
    network, images = tiny_network(), torch.randn(3, 3, 32, 32)
    layout = TokenLayout(network.width, n=widest.n_last_blocks, mean_patch=widest.avgpool)
    tokens = widest.of(network.backbone)(images)
    for choice in (CLS, BOTH, TWO, FeatureSpec(n_last_blocks=2, avgpool=True)):
        if choice.n_last_blocks <= widest.n_last_blocks and choice.avgpool <= widest.avgpool:
            right = linear_features(
                network.backbone, images, n_last_blocks=choice.n_last_blocks, avgpool=choice.avgpool
            )
            torch.testing.assert_close(layout.select(choice, tokens), right)
            assert choice.width(network) == right.shape[1]


def test_counting_against_a_loop() -> None:
    logits, labels = torch.randint(0, 4, (40, 7)).float(), torch.randint(0, 7, (40,))
    logits[3], logits[4, :2] = math.nan, math.inf
    right = [0, 0]
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(7), key=lambda c: (-row[c], c))
        known = not math.isnan(row[label])
        right = [count + (known and label in order[:k]) for count, k in zip(right, (1, 5), strict=True)]
    assert count_correct(logits, labels, topk=(1, 5)).tolist() == right
    both = count_correct(torch.stack([logits, -logits]), labels, topk=(1, 5))
    assert both[0].tolist() == right
    found = accuracy(lambda x: x, logits, labels, topk=(1, 5), device=CPU, chunk=7)
    assert found.tolist() == pytest.approx([100 * count / 40 for count in right])


def test_the_table_and_the_choice(tmp_path: Path) -> None:
    """Every entry is the accuracy of a classifier trained alone on the kept images, asked about the held-out ones."""
    task = tiny_task(tmp_path, tiny_network(), data=BUILTIN, seed=3)
    details = run(task, avgpool=[False, True], holdout=0.3)["top1"].details
    train_images: Any = task.splits.train
    held = torch.from_numpy(held_out(train_images.labels, share=0.3, seed=3))
    labels = torch.from_numpy(train_images.labels)
    viewed = ViewedImages(train_images, center_view(task.network), blank=(3, 32, 32))
    pixels = torch.stack([viewed[i][0] for i in range(len(viewed))])
    setting: dict[str, Any] = {"epochs": 4, "batch_size": 32, "classes": 12, "seed": 3}
    table = details["choices"]
    assert len(table) == 2 * 2 * 3
    assert details["heldout_images"] == int(held.sum())
    for entry in table:
        x = linear_features(
            task.network.backbone, pixels, n_last_blocks=entry["n_last_blocks"], avgpool=entry["avgpool"]
        )
        head = alone(x[~held], labels[~held], lr=entry["lr"], **setting)
        share = (head(x[held]).argmax(dim=1) == labels[held]).float().mean().item()
        assert entry["top1_heldout"] == pytest.approx(100 * share)
    best = max(table, key=lambda entry: entry["top1_heldout"])
    assert details["chosen"] == {key: best[key] for key in ("n_last_blocks", "avgpool", "lr")}
    # The classifier that is tested has seen the held-out images, too.
    x = linear_features(task.network.backbone, pixels, n_last_blocks=best["n_last_blocks"], avgpool=best["avgpool"])
    right, kept = alone(x, labels, lr=best["lr"], **setting), torch.load(details["classifier"], weights_only=True)
    torch.testing.assert_close(kept["state_dict"]["module.linear.weight"], right.weight.data, rtol=1e-4, atol=1e-5)


def test_validation_images_do_not_influence_the_choice(tmp_path: Path) -> None:
    task = tiny_task(tmp_path, tiny_network(), data=BUILTIN, seed=3)
    first = run(task)
    val: Any = Subset(cast(Any, task.splits.val), indices=np.arange(48))
    val.labels = np.random.default_rng(1).permutation(val.labels)
    task.__dict__["splits"] = Splits(task.splits.train, val, None)
    second = run(task)
    assert second["top1"].value != first["top1"].value
    for key in ("chosen", "choices", "lr_at_edge"):
        assert second["top1"].details[key] == first["top1"].details[key]


def test_the_saved_classifier_has_the_reported_accuracy(tmp_path: Path) -> None:
    task = tiny_task(tmp_path, tiny_network(), data=BUILTIN)
    found = run(task, avgpool=[True], n_last_blocks=[1])
    settings = LinearEval(n_last_blocks=1, avgpool=True, classifier=found["top1"].details["classifier"])
    again = {result.metric: result.value for result in linear.evaluate(settings, task)}
    assert again == {metric: found[metric].value for metric in ("top1", "top5")}
    assert found["top1_heldout"].value == max(entry["top1_heldout"] for entry in found["top1"].details["choices"])


@pytest.mark.parametrize(
    ("lrs", "expected"),
    [([1e-6, 0.5], "largest"), ([0.5, 1e39], "smallest"), ([1e-6, 0.5, 1e39], None), ([0.5], None)],
)
def test_a_best_rate_at_the_edge_is_reported(lrs: list[float], expected: str | None, tmp_path: Path) -> None:
    task, said = listened(tiny_task(tmp_path, tiny_network(), data=BUILTIN))
    details = run(task, lrs=lrs, n_last_blocks=[2])["top1"].details
    assert details["chosen"]["lr"] == 0.5
    assert details["lr_at_edge"] == (expected is not None)
    assert len(said) == (expected is not None)
    assert expected is None or f"The best learning rate, 0.5, is the {expected} of eval.lrs" in said[0]


def test_networks_without_blocks_have_one_kind_of_features(tmp_path: Path) -> None:
    task, said = listened(tiny_task(tmp_path, timm_network("resnet10t"), data=BUILTIN))
    details = run(task, avgpool=[False, True], epochs=1, lrs=[0.1])["top1"].details
    assert details["chosen"] == {"n_last_blocks": 1, "avgpool": False, "lr": 0.1}
    assert "resnet10t is not a ViT" in said[0]
    with pytest.raises(UserError, match=r"eval.n_last_blocks=\[1,2\] eval.avgpool=\[true\]: resnet10t is not a ViT"):
        run(task, avgpool=[True])


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="eval.n_last_blocks=4: vit0 has 2 blocks"):
        run(tiny_task(tmp_path, tiny_network(), data=BUILTIN), n_last_blocks=[1, 4])
    with pytest.raises(UserError, match="eval.holdout=0.1: no class has two training images"):
        run(tiny_task(tmp_path, tiny_network(), data=BuiltinData(train_images=12, val_images=12, num_workers=0)))
