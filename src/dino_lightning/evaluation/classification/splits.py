"""Labeled training and validation images of the same classes, and their features."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dino_lightning.config import ClassificationEval, DataConfig
from dino_lightning.data.sources import ImageSource
from dino_lightning.errors import UserError
from dino_lightning.evaluation.context import Task
from dino_lightning.evaluation.features.cache import cached_features, require_readable
from dino_lightning.evaluation.features.images import ViewedImages, center_images
from dino_lightning.evaluation.features.spec import NETWORK_OUTPUT, FeatureSpec

LABELS = {"train": "training images", "val": "validation images"}
"""What messages call the images of a split."""


@dataclass(frozen=True)
class LabeledSplits:
    """Images of both splits; the label -1 marks single unlabeled images."""

    train: ImageSource
    val: ImageSource
    classes: list[str]

    def labels(self, split: str) -> np.ndarray:
        """The label of each image of `train` or `val`, -1 for an unlabeled one."""
        labels = (self.train if split == "train" else self.val).labels
        assert labels is not None
        return labels

    def labeled_indices(self, split: str) -> list[int]:
        """Indices of the labeled images of `train` or `val`, ascending."""
        return np.flatnonzero(self.labels(split) >= 0).tolist()


def open_labeled(task: Task) -> LabeledSplits:
    """The images of a task. Raises `UserError` if labels, images or a split are missing, or if the classes differ."""
    train, val = task.splits.train, task.splits.val
    if not isinstance(train, ImageSource):
        raise UserError(
            "data: this evaluation reads images by index, which streams do not support; download the data, or set "
            "data.streaming=false."
        )
    if train.labels is None or train.classes is None:
        reason = f" ({task.splits.remark})" if task.splits.remark else ""
        raise UserError(f"data: the training images have no labels{reason}; this evaluation needs labels.")
    if val is None:
        raise UserError(
            "data: there are no validation images; add a validation split, or set data.holdout to a share of the "
            "training images."
        )
    if val.labels is None or val.classes is None:
        raise UserError("data: the validation images have no labels; this evaluation needs labels.")
    _check_same_classes(train.classes, val.classes)
    images = LabeledSplits(train, val, train.classes)
    for split, label in LABELS.items():
        if not images.labeled_indices(split):
            raise UserError(f"data: none of the {label} has a label; this evaluation needs labels.")
    return images


def _check_same_classes(train: list[str], val: list[str]) -> None:
    classes = {"training": train, "validation": val}
    for split, other in (("training", "validation"), ("validation", "training")):
        missing = [name for name in classes[split] if name not in set(classes[other])]
        if missing:
            raise UserError(
                f"data: the class '{missing[0]}' is among the {split} images but not among the {other} images "
                f"({len(train)} and {len(val)} classes); both need the same classes."
            )
    if train != val:
        raise UserError("data: the classes of training and validation images are in different orders.")


def split_images(task: Task, source: ImageSource, config: ClassificationEval, *, split: str) -> ViewedImages:
    """The center crop of each image of a split, as the checkpoint or `config` says."""
    return center_images(
        task.network,
        source,
        resize=config.image_resize,
        size=config.image_size,
        config=task.data if isinstance(task.data, DataConfig) else None,
        bad_images=task.output / f"bad_images_{split}.txt",
    )


def split_features(
    task: Task,
    config: ClassificationEval,
    images: LabeledSplits,
    split: str,
    *,
    spec: FeatureSpec = NETWORK_OUTPUT,
    indices: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Features (n, D) and labels (n,) of the readable labeled images of `train` or `val`, or those at `indices`.

    They are the same on every rank. Raises `UserError` if no image can be read.
    """
    features_ND, labels_N, _ = cached_features(
        task,
        task.context.forward(spec.of(task.network.backbone)),
        split_images(task, images.train if split == "train" else images.val, config, split=split),
        label=LABELS[split],
        kind=spec.cache_key,
        batch_size=config.batch_size_per_device,
        indices=images.labeled_indices(split) if indices is None else indices,
    )
    require_readable(labels_N, task, label=LABELS[split], split=split)
    return features_ND, labels_N
