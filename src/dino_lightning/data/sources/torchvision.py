"""Data sets that torchvision downloads and reads, such as `cifar10`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from filelock import FileLock
from torchvision.datasets import CIFAR10, CIFAR100, DTD, STL10, SVHN, Flowers102, Food101, OxfordIIITPet

from dino_lightning.config import TORCHVISION_NAMES, TorchvisionData
from dino_lightning.config.paths import usable_path
from dino_lightning.data.sources.base import Splits, content_digest
from dino_lightning.data.sources.mapped_arrays import MappedArrays, Paths, files_digest, packed
from dino_lightning.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Known:
    """How torchvision reads a data set."""

    kind: Any
    """Torchvision's class."""
    train: tuple[dict[str, Any], ...]
    """Its options for each part of the training images."""
    val: dict[str, Any]
    """Its options for the k-NN queries, the test images."""
    place: str
    """What it writes to `data.path`."""


TRAIN, TEST = ({"split": "train"},), {"split": "test"}
TRAIN_AND_VAL = ({"split": "train"}, {"split": "val"})
KNOWN = {
    "cifar10": Known(CIFAR10, ({"train": True},), {"train": False}, CIFAR10.base_folder),
    "cifar100": Known(CIFAR100, ({"train": True},), {"train": False}, CIFAR100.base_folder),
    "stl10": Known(STL10, ({"split": "train+unlabeled"},), TEST, STL10.base_folder),
    "svhn": Known(SVHN, TRAIN, TEST, "train_32x32.mat"),
    "food101": Known(Food101, TRAIN, TEST, "food-101"),
    "flowers102": Known(Flowers102, TRAIN_AND_VAL, TEST, "flowers-102"),
    "dtd": Known(DTD, TRAIN_AND_VAL, TEST, "dtd"),
    "oxford_iiit_pet": Known(OxfordIIITPet, ({"split": "trainval"},), TEST, "oxford-iiit-pet"),
}
"""Value of `data.name` -> what it is; the keys are those of `TORCHVISION_NAMES`."""


class Named:
    """One split, `train` or `val`, of a data set of torchvision.

    `stl10` trains on its 5,000 labeled images followed by its 100,000 unlabeled ones, whose label is -1. Whoever
    compares labels (a k-NN bank, a probe) takes the images with `labels >= 0` only.
    """

    def __init__(self, name: str, *, split: str, labels: np.ndarray, classes: list[str]):
        self.name, self.split = name, split
        self.labels, self.classes = labels, classes

    def __len__(self) -> int:
        return len(self.labels)


class PixelImages(Named):
    """A data set of decoded images, `data` (n, H, W, 3)."""

    def __init__(self, name: str, *, data: np.ndarray, **options: Any):
        super().__init__(name, **options)
        self.data = data

    def read(self, index: int) -> np.ndarray:
        """The image (H, W, 3)."""
        return self.data[index]

    def describe(self, index: int) -> str:
        """Name of the data set, split and row."""
        return f"{self.name} {self.split} row {index}"

    def fingerprint(self) -> str:
        """Of name, split and size: torchvision checks the files against fixed checksums."""
        return content_digest(f"{self.name} {self.split} {len(self)}".encode())


class FileImages(Named):
    """A data set of image files."""

    def __init__(self, name: str, *, files: list[Path], **options: Any):
        super().__init__(name, **options)
        self.paths = Paths(MappedArrays(packed(bytes(file) for file in files)))

    def read(self, index: int) -> bytes:
        """The file."""
        return Path(self.paths[index]).read_bytes()

    def describe(self, index: int) -> str:
        """Path of the file."""
        return self.paths[index]

    def fingerprint(self) -> str:
        """Of the files' paths, sizes and times."""
        return files_digest([self.paths.blob, self.paths.offsets], files=map(self.describe, range(len(self))))


def open_torchvision(config: TorchvisionData) -> Splits:
    """Training and validation images, and what the user should know."""
    if config.name not in TORCHVISION_NAMES:
        raise UserError(
            f"data.name={config.name} is not among torchvision's data sets here; "
            f"{did_you_mean(config.name, TORCHVISION_NAMES)}"
        )
    train, val = (_open(config, split=split) for split in ("train", "val"))
    if train.classes != val.classes:
        raise UserError(f"data.path={config.path}: the splits of {config.name} have different classes; unpack it anew")
    unlabeled = int((train.labels < 0).sum())
    notice = f"{unlabeled} of the {len(train)} training images have no label: k-NN compares with the others"
    return Splits(train, val, notice if unlabeled else None)


def _open(config: TorchvisionData, *, split: str) -> PixelImages | FileImages:
    known = KNOWN[config.name]
    parts = [_read(config, options) for options in (known.train if split == "train" else (known.val,))]
    labels = np.concatenate([np.asarray(_attribute(part, "targets", "labels", "_labels")) for part in parts])
    # STL10 has names only where its optional class_names.txt is there, SVHN never.
    names = getattr(parts[0], "classes", None) or map(str, range(int(labels.max()) + 1))
    options = {"split": split, "labels": labels.astype(np.int64), "classes": list(names)}
    if known.kind in (CIFAR10, CIFAR100, STL10, SVHN):
        return PixelImages(config.name, data=_pixels(parts[0]), **options)
    files = [Path(file) for part in parts for file in _attribute(part, "_image_files", "_images")]
    return FileImages(config.name, files=files, **options)


def _pixels(part: CIFAR10 | STL10 | SVHN) -> np.ndarray:
    if isinstance(part, CIFAR10):
        return part.data
    data = part.data.transpose(0, 2, 3, 1)
    # In SVHN's file the images are the fastest index: one image would be gathered from all over the array.
    return np.ascontiguousarray(data) if isinstance(part, SVHN) else data


def _attribute(part: Any, *names: str) -> Any:
    """The first of the attributes that this data set has: torchvision promises the images only, not their files."""
    for name in names:
        if hasattr(part, name):
            return getattr(part, name)
    raise UserError(
        f"data.name: this torchvision ({torchvision.__version__}) keeps the files of {type(part).__name__} in a way "
        "that is not known here; take data=folder"
    )


def _read(config: TorchvisionData, options: dict[str, Any]) -> Any:
    """One part from `data.path`, downloaded first where it is incomplete and `data.download` allows it."""
    known, root = KNOWN[config.name], usable_path("data.path", config.path)
    build: Callable[..., Any] = known.kind
    try:
        return build(root, download=False, **options)
    except ModuleNotFoundError as error:
        library = str(error.name).partition(".")[0]
        raise UserError(f"data.name={config.name} needs {library}; install it (pip install {library})") from error
    except (RuntimeError, FileNotFoundError) as error:  # missing files, and files with the wrong checksum
        if not config.download:
            raise UserError(
                f"data.path={root} holds no complete '{known.place}' of {config.name}; "
                "give the folder that holds it or set data.download=true"
            ) from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        # One process of a node downloads; the others wait here and then find the files.
        with FileLock(root / f".{config.name}.lock"):
            return build(root, download=True, **options)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"data.download=true could not bring {config.name} to data.path={root} ({error}); "
            f"unpack {getattr(known.kind, 'url', 'it')} there yourself"
        ) from error
