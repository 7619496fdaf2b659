"""What an evaluation by classes needs of its data: labeled training and validation images of the same classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dino_lightning.config import ClassificationEval, DataConfig
from dino_lightning.data.sources import ImageSource
from dino_lightning.errors import UserError
from dino_lightning.evaluation.context import Task
from dino_lightning.evaluation.features.cache import cached_features
from dino_lightning.evaluation.features.images import ViewedImages, center_view


@dataclass(frozen=True)
class Labeled:
    """Images of both splits; single ones may have the label -1, none known."""

    train: ImageSource
    val: ImageSource
    classes: list[str]

    def known(self, split: str) -> list[int]:
        """Positions of the images of `train` or `val` that have a label, rising."""
        labels = (self.train if split == "train" else self.val).labels
        assert labels is not None
        return np.flatnonzero(labels >= 0).tolist()


def labeled_sources(task: Task) -> Labeled:
    """The images of a task. Raises `UserError` where labels, images or a split are missing, or the classes differ."""
    train, val = task.sources.train, task.sources.val
    if not isinstance(train, ImageSource):
        raise UserError(
            "data: this evaluation reads images by index and cannot use a stream; download the data, or "
            "set data.streaming=false."
        )
    if train.labels is None or train.classes is None:
        why = f" ({task.sources.remark})" if task.sources.remark else ""
        raise UserError(f"data: the training images have no labels{why}; this evaluation needs classes.")
    if val is None:
        raise UserError(
            "data: there are no validation images; add a validation split, or set data.holdout to a share "
            "of the training images."
        )
    if val.labels is None or val.classes is None:
        raise UserError("data: the validation images have no labels; this evaluation needs their classes.")
    _check_same_classes(train.classes, val.classes)
    found = Labeled(train, val, train.classes)
    for split, words in (("train", "training"), ("val", "validation")):
        if not found.known(split):
            raise UserError(f"data: none of the {words} images has a label; this evaluation needs some.")
    return found


def _check_same_classes(train: list[str], val: list[str]) -> None:
    if train == val:
        return
    for here, there, names in (("training", "validation", (train, val)), ("validation", "training", (val, train))):
        alone = [name for name in names[0] if name not in set(names[1])]
        if alone:
            raise UserError(
                f"data: the class '{alone[0]}' is among the {here} images but not among the {there} images "
                f"({len(train)} and {len(val)} classes); give both the same classes."
            )
    raise UserError("data: training and validation images count the same classes in another order; give both the same.")


def viewed(task: Task, source: ImageSource, config: ClassificationEval, *, split: str) -> ViewedImages:
    """The center of each image of a split, as the checkpoint or `config` says."""
    network = task.network
    view = center_view(network, resize=config.image_resize, size=config.image_size)
    size = config.image_size or network.size
    return ViewedImages(
        source,
        view,
        blank=(network.channels, size, size),
        config=task.data if isinstance(task.data, DataConfig) else None,
        bad_images=task.output / f"bad_images_{split}.txt",
    )


def class_features(
    task: Task, config: ClassificationEval, images: Labeled, *, chosen: Mapping[str, Sequence[int]] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Features (n, D) and labels (n,) of the labeled images of `train` and `val`, on every rank.

    `chosen` has positions for each split instead. Raises `UserError` where no image of a split can be read.
    """
    found = {}
    for split, source, what in (("train", images.train, "training images"), ("val", images.val, "validation images")):
        features, labels, _ = cached_features(
            task,
            task.runtime.forward(task.network.backbone),
            viewed(task, source, config, split=split),
            what=what,
            kind="backbone",
            batch_size=config.batch_size_per_device,
            indices=images.known(split) if chosen is None else chosen[split],
        )
        if not len(labels):
            raise UserError(f"data: none of the {what} can be read, see {task.output / f'bad_images_{split}.txt'}.")
        found[split] = features, labels
    return found
