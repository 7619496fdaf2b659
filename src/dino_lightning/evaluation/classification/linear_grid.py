"""`eval=linear_grid`: linear classifiers for a grid of learning rates and features, on one pass of the backbone.

Images are seen once, from the center, without augmentation. All classifiers are trained at once on a part of the
training images; the rest, held out by class and seed, decides among them. The chosen setting is trained once more on
all training images, one more pass over the features, and only that classifier is tested: the validation images choose
nothing.

The tokens of all images stand in the memory of every rank: 4 (N + M) (n + 1) D bytes for N training and M validation
images, n blocks and tokens of width D (10 GB for ImageNet, ViT-S and n = 4); without `avgpool`, n in the place of
n + 1. Ranks share the choices of features among them, and their number changes no figure.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dino_lightning.config import LinearGridEval
from dino_lightning.data.sources.base import held_out
from dino_lightning.errors import UserError
from dino_lightning.evaluation.classification.classifiers import accuracy, guesses, write_classifier
from dino_lightning.evaluation.classification.linear_heads import Heads, Tokens, train
from dino_lightning.evaluation.classification.splits import Labeled, labeled_sources, viewed
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.cache import cached_features
from dino_lightning.evaluation.features.choice import FeatureChoice
from dino_lightning.runtime.collectives import all_reduce_sum, rank, world_size


def evaluate(config: LinearGridEval, task: Task) -> Iterator[Result]:
    """`top1` and `top5` of the chosen setting, and `top1_heldout`, the accuracy by which it was chosen."""
    images = labeled_sources(task)
    choices = possible_choices(config, task)
    _check_holdout(config, images, seed=task.seed)
    layout = Tokens(
        task.network.width,
        n=max(choice.n_last_blocks for choice in choices),
        mean_patch=any(choice.avgpool for choice in choices),
    )
    tokens_NT, labels_N = _tokens(config, task, images, layout, split="train")
    held_N = torch.from_numpy(held_out(labels_N.numpy(), share=config.holdout, seed=task.seed))
    search = Search(config, task, layout, classes=len(images.classes))
    heldout = search.heldout_accuracies(choices, tokens_NT, labels_N, held_N)
    # Of equal accuracies the first one: fewer features and the lower rate, as the lists stand.
    best = int(heldout.flatten().argmax())
    choice, lr = choices[best // len(search.lrs)], search.lrs[best % len(search.lrs)]
    at_edge = len(search.lrs) > 1 and lr in (min(search.lrs), max(search.lrs))
    if at_edge:
        which, more = ("largest", "larger") if lr == max(search.lrs) else ("smallest", "smaller")
        task.runtime.say(f"The best learning rate, {lr:g}, is the {which} of eval.lrs: try {more} ones, too.")
    everything = torch.arange(len(labels_N))
    final = search.trained({choice: [lr]}, tokens_NT, labels_N, everything, what="Chosen linear classifier")[choice]
    tokens_MT, labels_M = _tokens(config, task, images, layout, split="val")
    top = _test(task, search, choice, final, tokens_MT, labels_M)
    details = {
        "chosen": {"n_last_blocks": choice.n_last_blocks, "avgpool": choice.avgpool, "lr": lr},
        "lr_at_edge": at_edge,
        "choices": [
            {"n_last_blocks": c.n_last_blocks, "avgpool": c.avgpool, "lr": rate, "top1_heldout": value}
            for c, row in zip(choices, heldout.tolist(), strict=True)
            for rate, value in zip(search.lrs, row, strict=True)
        ],
        "heldout_images": int(held_N.sum()),
        "train_images": len(labels_N),
        "val_images": len(labels_M),
        "classes": len(images.classes),
        "classifier": _keep(task, final),
    }
    yield Result("top1", top[0], main=True, details=details)
    if len(top) > 1:
        yield Result("top5", top[1], main=True)
    yield Result("top1_heldout", float(heldout.max()), details={"chosen": details["chosen"]})


def possible_choices(config: LinearGridEval, task: Task) -> list[FeatureChoice]:
    """The configured choices that the network has. Raises `UserError` where none is left."""
    network = task.network
    wanted = [FeatureChoice(n, avgpool) for n in config.n_last_blocks for avgpool in config.avgpool]
    wanted = list(dict.fromkeys(wanted))
    possible = [choice for choice in wanted if choice.possible(network)]
    if not possible:
        raise UserError(
            f"eval.n_last_blocks={_shown(config.n_last_blocks)} eval.avgpool={_shown(config.avgpool)}: "
            f"{network.name} is no ViT and has one kind of features; let the lists hold 1 and "
            "false."
        )
    if len(possible) < len(wanted):
        task.runtime.say(
            f"{network.name} is no ViT and has one kind of features: only eval.n_last_blocks=1 with "
            "eval.avgpool=false is tried."
        )
    return possible


def _shown(values: list[Any]) -> str:
    return f"[{','.join(str(value).lower() for value in values)}]"


def _check_holdout(config: LinearGridEval, images: Labeled, *, seed: int) -> None:
    labels = images.train.labels
    assert labels is not None
    if not held_out(labels, share=config.holdout, seed=seed).any():
        raise UserError(
            f"eval.holdout={config.holdout:g}: no class has two training images, of which one could be held out."
        )


def _tokens(
    config: LinearGridEval, task: Task, images: Labeled, layout: Tokens, *, split: str
) -> tuple[Tensor, Tensor]:
    """Tokens (N, T) and labels (N,) of the readable images of a split."""
    widest = FeatureChoice(layout.n, layout.mean_patch)
    source, what = (images.train, "training images") if split == "train" else (images.val, "validation images")
    tokens_NT, labels_N, _ = cached_features(
        task,
        task.runtime.forward(widest.of(task.network.backbone)),
        viewed(task, source, config, split=split),
        what=what,
        kind=f"linear, {widest}",
        batch_size=config.batch_size_per_device,
        indices=images.known(split),
    )
    if not len(labels_N):
        raise UserError(f"data: none of the {what} can be read, see {task.output / f'bad_images_{split}.txt'}.")
    return tokens_NT, labels_N


class Search:
    """Training of classifiers as the configuration says."""

    def __init__(self, config: LinearGridEval, task: Task, layout: Tokens, *, classes: int) -> None:
        self.config, self.task, self.layout, self.classes = config, task, layout, classes
        self.lrs = list(dict.fromkeys(config.lrs))
        self.device = task.runtime.device

    def heldout_accuracies(
        self, choices: list[FeatureChoice], tokens_NT: Tensor, labels_N: Tensor, held_N: Tensor
    ) -> Tensor:
        """Per cent of the held-out images, for each choice of features and learning rate: (choices, L).

        Each rank trains for some of the choices.
        """
        own = range(rank(), len(choices), world_size())
        wanted = {choices[number]: self.lrs for number in own}
        kept = torch.nonzero(~held_N).flatten()
        heads = self.trained(wanted, tokens_NT, labels_N, kept, what="Linear classifiers")
        table = torch.zeros(len(choices), len(self.lrs), dtype=torch.float64)
        tokens_HT, labels_H = tokens_NT[held_N], labels_N[held_N]
        for number in own:
            table[number] = self.accuracy(choices[number], heads[choices[number]], tokens_HT, labels_H)[:, 0]
        return all_reduce_sum(table)

    def trained(
        self, wanted: dict[FeatureChoice, list[float]], tokens_NT: Tensor, labels_N: Tensor, rows: Tensor, *, what: str
    ) -> dict[FeatureChoice, Heads]:
        """Classifiers for learning rates of some kinds of features, trained together on the images `rows`."""
        config, seed = self.config, self.task.seed
        heads = {
            choice: Heads(choice.width(self.task.network), self.classes, lrs=lrs, seed=seed, device=self.device)
            for choice, lrs in wanted.items()
        }
        with self.task.runtime.progress(what, total=config.epochs) as advance:
            train(
                heads,
                tokens_NT,
                labels_N,
                rows=rows,
                layout=self.layout,
                epochs=config.epochs,
                batch_size=config.classifier_batch_size,
                seed=seed,
                device=self.device,
                advance=advance,
            )
        return heads

    def accuracy(self, choice: FeatureChoice, heads: Heads, tokens_MT: Tensor, labels_M: Tensor) -> Tensor:
        """Per cent with 1 and, of five classes or more, 5 guesses: (L, K)."""
        return accuracy(
            lambda tokens_BT: heads.logits(self.layout.of(choice, tokens_BT)),
            tokens_MT,
            labels_M,
            topk=guesses(self.classes),
            device=self.device,
        )


def _test(
    task: Task, search: Search, choice: FeatureChoice, heads: Heads, tokens_MT: Tensor, labels_M: Tensor
) -> list[float]:
    """The figures of the main process, on all: each has trained the classifier anew, and devices may differ."""
    return task.runtime.fabric.broadcast(search.accuracy(choice, heads, tokens_MT, labels_M)[0].tolist())


def _keep(task: Task, heads: Heads) -> str:
    """Write the classifier where `eval=linear eval.classifier=PATH` can test it."""
    path = task.output / "linear_grid" / f"classifier_{task.network.digest}.pt"
    if task.runtime.is_main:
        write_classifier(path, heads.weight_LCD[0], heads.bias_LC[0])
    return str(path)
