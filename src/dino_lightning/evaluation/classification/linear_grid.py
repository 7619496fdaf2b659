"""`eval=linear_grid`: linear classifiers for a grid of learning rates and features, on one pass of the backbone.

Images are center crops without augmentation, seen once. All classifiers are trained together on a part of the training
images; the rest, held out by class and seed, selects one of them. The selected setting is trained again on all training
images, and only that classifier is tested: the validation images select nothing.

Every rank holds the tokens of all images in memory: 4 (N + M) (n + 1) D bytes for N training and M validation images,
n blocks and tokens of width D (10 GB for ImageNet, ViT-S and n = 4); without `avgpool`, n instead of n + 1. The ranks
share the choices of features, and their number does not change any figure.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dino_lightning.config import LinearGridEval
from dino_lightning.config.dotted import format_value
from dino_lightning.data.sources.base import held_out
from dino_lightning.errors import UserError
from dino_lightning.evaluation.classification.classifiers import accuracy, accuracy_topk, top_results, write_classifier
from dino_lightning.evaluation.classification.linear_heads import LinearHeads, TokenLayout, train
from dino_lightning.evaluation.classification.splits import open_labeled, split_features
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.spec import FeatureSpec
from dino_lightning.evaluation.registry import register_evaluation
from dino_lightning.runtime.collectives import all_reduce_sum, rank, world_size


@register_evaluation("linear_grid", LinearGridEval)
def evaluate(config: LinearGridEval, task: Task) -> Iterator[Result]:
    """`top1` and `top5` of the selected setting, and `top1_heldout`, the accuracy that selected it."""
    images = open_labeled(task)
    specs = possible_specs(config, task)
    if not held_out(images.labels("train"), share=config.holdout, seed=task.seed).any():
        raise UserError(f"eval.holdout={config.holdout:g}: no class has two training images, so none can be held out.")
    # The tokens of the widest spec contain those of all others.
    widest = FeatureSpec(max(spec.n_last_blocks for spec in specs), any(spec.avgpool for spec in specs))
    layout = TokenLayout(task.network.width, n=widest.n_last_blocks, mean_patch=widest.avgpool)
    tokens_NT, labels_N = split_features(task, config, images, "train", spec=widest)
    held_N = torch.from_numpy(held_out(labels_N.numpy(), share=config.holdout, seed=task.seed))
    search = GridSearch(config, task, layout, classes=len(images.classes))
    heldout = search.heldout_accuracies(specs, tokens_NT, labels_N, held_N)
    # Among equal accuracies the first one, in the order of the lists.
    best = int(heldout.flatten().argmax())
    spec, lr = specs[best // len(search.lrs)], search.lrs[best % len(search.lrs)]
    at_edge = len(search.lrs) > 1 and lr in (min(search.lrs), max(search.lrs))
    if at_edge:
        extreme, other = ("largest", "larger") if lr == max(search.lrs) else ("smallest", "smaller")
        task.context.say(f"The best learning rate, {lr:g}, is the {extreme} of eval.lrs: also try {other} ones.")
    every_image = torch.arange(len(labels_N))
    heads = search.train({spec: [lr]}, tokens_NT, labels_N, every_image, label="Selected linear classifier")[spec]
    tokens_MT, labels_M = split_features(task, config, images, "val", spec=widest)
    # From the main process: each rank has trained the classifier, and devices may differ.
    top = task.context.fabric.broadcast(search.accuracy(spec, heads, tokens_MT, labels_M)[0].tolist())
    file = task.output / "linear_grid" / f"classifier_{task.network.digest}.pt"
    if task.context.is_main:
        write_classifier(file, heads.weight_LCD[0], heads.bias_LC[0])  # `eval=linear eval.classifier=PATH` can test it
    chosen = {"n_last_blocks": spec.n_last_blocks, "avgpool": spec.avgpool, "lr": lr}
    details = {
        "chosen": chosen,
        "lr_at_edge": at_edge,
        "choices": [
            {"n_last_blocks": spec.n_last_blocks, "avgpool": spec.avgpool, "lr": rate, "top1_heldout": value}
            for spec, accuracies in zip(specs, heldout.tolist(), strict=True)
            for rate, value in zip(search.lrs, accuracies, strict=True)
        ],
        "heldout_images": int(held_N.sum()),
        "train_images": len(labels_N),
        "val_images": len(labels_M),
        "classes": len(images.classes),
        "classifier": str(file),
    }
    yield from top_results(top, details)
    yield Result("top1_heldout", float(heldout.max()), details={"chosen": chosen})


def possible_specs(config: LinearGridEval, task: Task) -> list[FeatureSpec]:
    """The configured features that the network has. Raises `UserError` if there are none."""
    network = task.network
    specs = list(dict.fromkeys(FeatureSpec(n, avgpool) for n in config.n_last_blocks for avgpool in config.avgpool))
    possible = [spec for spec in specs if spec.exists_in(network)]
    if not possible:
        raise UserError(
            f"eval.n_last_blocks={format_value(config.n_last_blocks)} eval.avgpool={format_value(config.avgpool)}: "
            f"{network.name} is not a ViT and has only one kind of features; the lists must contain 1 and false."
        )
    if len(possible) < len(specs):
        task.context.say(
            f"{network.name} is not a ViT and has only one kind of features: eval.n_last_blocks=1 with "
            "eval.avgpool=false is the only choice."
        )
    return possible


class GridSearch:
    """Trains classifiers as configured."""

    def __init__(self, config: LinearGridEval, task: Task, layout: TokenLayout, *, classes: int) -> None:
        self.config, self.task, self.layout, self.classes = config, task, layout, classes
        self.lrs = list(dict.fromkeys(config.lrs))
        self.device = task.context.device

    def heldout_accuracies(
        self, specs: list[FeatureSpec], tokens_NT: Tensor, labels_N: Tensor, held_N: Tensor
    ) -> Tensor:
        """Accuracy in percent on the held-out images, for each spec and learning rate: (specs, L).

        Each rank trains for some of the specs.
        """
        local = range(rank(), len(specs), world_size())
        indices = torch.nonzero(~held_N).flatten()
        grid = {specs[i]: self.lrs for i in local}
        heads = self.train(grid, tokens_NT, labels_N, indices, label="Linear classifiers")
        table = torch.zeros(len(specs), len(self.lrs), dtype=torch.float64)
        tokens_HT, labels_H = tokens_NT[held_N], labels_N[held_N]
        for i in local:
            table[i] = self.accuracy(specs[i], heads[specs[i]], tokens_HT, labels_H)[:, 0]
        return all_reduce_sum(table)

    def train(
        self, grid: dict[FeatureSpec, list[float]], tokens_NT: Tensor, labels_N: Tensor, indices: Tensor, *, label: str
    ) -> dict[FeatureSpec, LinearHeads]:
        """Classifiers for the learning rates of each spec, trained together on the images at `indices`."""
        config, network = self.config, self.task.network
        options: dict[str, Any] = {"seed": self.task.seed, "device": self.device}
        heads = {s: LinearHeads(s.width(network), self.classes, lrs=lrs, **options) for s, lrs in grid.items()}
        options |= {"epochs": config.epochs, "batch_size": config.classifier_batch_size}
        with self.task.context.progress(label, total=config.epochs) as advance:
            train(heads, tokens_NT, labels_N, indices=indices, layout=self.layout, advance=advance, **options)
        return heads

    def accuracy(self, spec: FeatureSpec, heads: LinearHeads, tokens_MT: Tensor, labels_M: Tensor) -> Tensor:
        """Top-1 accuracy in percent and, of five classes or more, top-5: (L, K)."""
        return accuracy(
            lambda tokens_BT: heads.logits(self.layout.select(spec, tokens_BT)),
            tokens_MT,
            labels_M,
            topk=accuracy_topk(self.classes),
            device=self.device,
        )
