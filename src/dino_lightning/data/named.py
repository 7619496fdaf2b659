"""Data sets that torchvision downloads and reads: `cifar10`, `cifar100`, `stl10`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from dino_lightning.config.images import TorchvisionData
from dino_lightning.errors import UserError, nearest

KNOWN: dict[str, type[CIFAR10] | type[STL10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100, "stl10": STL10}
"""Value of `data.name` -> torchvision's class."""


class TorchvisionImages:
    """One split, `train` or `val` (torchvision's `test`), of a data set of torchvision.

    `stl10` trains on its 5,000 labelled images followed by its 100,000 unlabelled ones, whose label is -1. Whoever
    compares labels (a k-NN bank, a probe) takes the images with `labels >= 0` only.
    """

    def __init__(self, name: str, *, split: str, root: Path, download: bool):
        self.name = name
        self.split = split
        kind = KNOWN[name]
        self._images = _read(lambda **options: _split(kind, split, **options), name=name, root=root, download=download)
        targets = self._images.labels if isinstance(self._images, STL10) else self._images.targets
        self.labels = np.asarray(targets, dtype=np.int64)
        numbered = [str(label) for label in range(int(self.labels.max()) + 1)]
        # STL10 has names only where its optional class_names.txt is there.
        self.classes: list[str] = list(getattr(self._images, "classes", numbered))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self._images[index][0], int(self.labels[index])

    def describe(self, index: int) -> str:
        """Name of the data set, split and row."""
        return f"{self.name} {self.split} row {index}"


def open_torchvision(config: TorchvisionData) -> tuple[TorchvisionImages, TorchvisionImages, str | None]:
    """Training and validation images, and what the user should know."""
    if config.name not in KNOWN:
        raise UserError(
            f"data.name={config.name} is not among torchvision's data sets here; {nearest(config.name, KNOWN)}"
        )
    root = Path(config.path).expanduser()
    train = TorchvisionImages(config.name, split="train", root=root, download=config.download)
    val = TorchvisionImages(config.name, split="val", root=root, download=config.download)
    unlabelled = int((train.labels < 0).sum())
    notice = f"{unlabelled} of the {len(train)} training images have no label: k-NN compares with the others"
    return train, val, notice if unlabelled else None


def _split(kind: type[CIFAR10] | type[STL10], split: str, *, root: Path, download: bool) -> CIFAR10 | STL10:
    if issubclass(kind, STL10):
        return kind(root, split="train+unlabeled" if split == "train" else "test", download=download)
    return kind(root, train=split == "train", download=download)


def _read(build: Callable[..., Any], *, name: str, root: Path, download: bool) -> Any:
    """The data set from `root`, downloaded first where it is incomplete and `download` allows it."""
    try:
        return build(root=root, download=False)
    except RuntimeError as error:  # torchvision's word for files that are missing or have the wrong checksum
        if not download:
            folder = KNOWN[name].base_folder
            raise UserError(
                f"data.path={root} holds no complete '{folder}', the folder of {name}; "
                "give the folder that holds it or set data.download=true"
            ) from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        # One process of a node downloads; the others wait here and then find the files.
        with FileLock(root / f".{name}.lock"):
            return build(root=root, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"data.download=true could not bring {name} to data.path={root} ({error}); "
            f"unpack {KNOWN[name].url} there yourself"
        ) from error
