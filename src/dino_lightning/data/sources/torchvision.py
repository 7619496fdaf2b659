"""Datasets that torchvision downloads and reads, such as `cifar10`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torchvision
from torchvision.datasets import CIFAR10, CIFAR100, DTD, STL10, SVHN, Flowers102, Food101, OxfordIIITPet

from dino_lightning.config import TorchvisionData
from dino_lightning.config.paths import usable_path
from dino_lightning.data.sources.base import Splits, content_digest
from dino_lightning.data.sources.mapped_arrays import ImageFiles, MappedArrays, pack_paths
from dino_lightning.data.sources.registry import register_source
from dino_lightning.errors import UserError
from dino_lightning.runtime.locks import exclusive


class TorchvisionSpec(NamedTuple):
    """A class of torchvision, with its arguments for each part of `train` and for `val`, which are the test images.

    `file` is the file or folder that it creates in `data.path`.
    """

    dataset: Any
    train: tuple[dict[str, Any], ...]
    val: dict[str, Any]
    file: str


TRAIN, TEST = ({"split": "train"},), {"split": "test"}
TRAIN_AND_VAL = ({"split": "train"}, {"split": "val"})
SPECS = {
    "cifar10": TorchvisionSpec(CIFAR10, ({"train": True},), {"train": False}, CIFAR10.base_folder),
    "cifar100": TorchvisionSpec(CIFAR100, ({"train": True},), {"train": False}, CIFAR100.base_folder),
    "stl10": TorchvisionSpec(STL10, ({"split": "train+unlabeled"},), TEST, STL10.base_folder),
    "svhn": TorchvisionSpec(SVHN, TRAIN, TEST, "train_32x32.mat"),
    "food101": TorchvisionSpec(Food101, TRAIN, TEST, "food-101"),
    "flowers102": TorchvisionSpec(Flowers102, TRAIN_AND_VAL, TEST, "flowers-102"),
    "dtd": TorchvisionSpec(DTD, TRAIN_AND_VAL, TEST, "dtd"),
    "oxford_iiit_pet": TorchvisionSpec(OxfordIIITPet, ({"split": "trainval"},), TEST, "oxford-iiit-pet"),
}
"""By `data.name`; the keys are `TORCHVISION_NAMES`."""


class PixelImages:
    """One split of a dataset of decoded images, `data` (n, H, W, 3); `name` names dataset and split.

    `stl10` trains on its 5,000 labeled images followed by its 100,000 unlabeled ones, whose label is -1; evaluations
    that compare labels (a k-NN bank, a probe) use only images with `labels >= 0`.
    """

    def __init__(self, name: str, *, data: np.ndarray, labels: np.ndarray, classes: list[str]):
        self.name, self.data, self.labels, self.classes = name, data, labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        """The image (H, W, 3)."""
        return self.data[index]

    def describe(self, index: int) -> str:
        """Name of the dataset, split and row."""
        return f"{self.name} row {index}"

    def fingerprint(self) -> str:
        """Digest of name, split and size, because torchvision verifies the checksums of the files."""
        return content_digest(f"{self.name} {len(self)}".encode())


@register_source("torchvision", TorchvisionData)
def open_torchvision(config: TorchvisionData) -> Splits:
    """Training and validation images."""
    train, val = (_open(config, split=split) for split in ("train", "val"))
    if train.classes != val.classes:
        raise UserError(
            f"data.path={config.path}: the splits of {config.name} have different classes; extract the dataset again"
        )
    assert train.labels is not None
    unlabeled = int((train.labels < 0).sum())
    remark = f"{unlabeled} of the {len(train)} training images have no label: the k-NN bank contains the others"
    return Splits(train, val, remark if unlabeled else None)


def _open(config: TorchvisionData, *, split: str) -> PixelImages | ImageFiles:
    spec = SPECS[config.name]
    parts = [_read(config, arguments) for arguments in (spec.train if split == "train" else (spec.val,))]
    labels = np.concatenate([np.asarray(_attribute(part, "targets", "labels", "_labels")) for part in parts])
    # STL10 has class names only if its optional class_names.txt exists, SVHN never.
    names = getattr(parts[0], "classes", None) or map(str, range(int(labels.max()) + 1))
    labels, classes = labels.astype(np.int64), list(names)
    if spec.dataset in (CIFAR10, CIFAR100, STL10, SVHN):
        return PixelImages(f"{config.name} {split}", data=_pixels(parts[0]), labels=labels, classes=classes)
    files = (bytes(Path(file)) for part in parts for file in _attribute(part, "_image_files", "_images"))
    return ImageFiles("", arrays=MappedArrays({**pack_paths(files), "labels": labels}), classes=classes)


def _pixels(part: CIFAR10 | STL10 | SVHN) -> np.ndarray:
    if isinstance(part, CIFAR10):
        return part.data
    data = part.data.transpose(0, 2, 3, 1)
    # In SVHN's file the images are the fastest index, so one image would be gathered from all over the array.
    return np.ascontiguousarray(data) if isinstance(part, SVHN) else data


def _attribute(part: Any, *names: str) -> Any:
    """The first of the attributes that this dataset has: the attributes are not part of torchvision's public API."""
    for name in names:
        if hasattr(part, name):
            return getattr(part, name)
    raise UserError(
        f"data.name: {type(part).__name__} of this torchvision ({torchvision.__version__}) has no attribute "
        f"{' or '.join(names)}; use data=folder"
    )


def _read(config: TorchvisionData, arguments: dict[str, Any]) -> Any:
    """One part from `data.path`, downloaded first if it is incomplete and `data.download` allows it."""
    spec, root = SPECS[config.name], usable_path("data.path", config.path)
    build: Callable[..., Any] = spec.dataset
    try:
        return build(root, download=False, **arguments)
    except ModuleNotFoundError as error:
        library = str(error.name).partition(".")[0]
        raise UserError(f"data.name={config.name} needs {library}; install it (pip install {library})") from error
    except (RuntimeError, FileNotFoundError) as error:  # missing files, and files with the wrong checksum
        if not config.download:
            raise UserError(
                f"data.path={root} contains no complete '{spec.file}' of {config.name}; "
                "choose the folder that contains it, or set data.download=true"
            ) from error
    try:
        # One process per machine downloads; the others wait.
        with exclusive(root / f".{config.name}.lock"):
            return build(root, download=True, **arguments)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"data.download=true: {config.name} cannot be downloaded to data.path={root} ({error}); "
            f"extract {getattr(spec.dataset, 'url', 'it')} there yourself"
        ) from error
