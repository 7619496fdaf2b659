"""Where images come from: `open_sources` turns a data configuration into a training and a validation source.

A source gives a PIL image in RGB and a label. Wrong settings raise `UserError` here, when it is opened; a broken image
raises PIL's error when it is read, and `describe` says which image it was.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from dino_lightning.config.images import BuiltinData, DataConfig, FolderData, ParquetData, TorchvisionData
from dino_lightning.data.folder import open_folder
from dino_lightning.errors import UserError


class ImageSource(Protocol):
    """Images with or without labels, picklable for loader workers."""

    @property
    def classes(self) -> list[str] | None:
        """Class names, the label being the index; None without labels."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """Labels (n,) int64, -1 for a single image without one; None without labels."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]: ...

    def describe(self, index: int, /) -> str:
        """How to name the image to a person."""
        ...


@dataclass(frozen=True)
class Sources:
    """The opened images: `val` holds the k-NN queries, None where there are no labels or none were kept.

    Single training images may have the label -1 (`stl10`): they train, but a k-NN bank leaves them out.
    """

    train: ImageSource
    val: ImageSource | None
    notice: str | None
    """One line on how the folders were read, where a person should know."""


class Part:
    """The images `indices` (m,) of another source."""

    def __init__(self, source: ImageSource, *, indices: np.ndarray):
        self.source = source
        self.indices = indices
        self.classes = source.classes
        self.labels = None if source.labels is None else source.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.source[int(self.indices[index])]

    def describe(self, index: int) -> str:
        """The other source's name of the image."""
        return self.source.describe(int(self.indices[index]))


def open_sources(config: DataConfig, *, seed: int) -> Sources:
    """Open the images that `config` describes; `seed` picks the held-out ones where there is no validation split."""
    if not 0 <= config.holdout < 1:
        raise UserError(f"data.holdout={config.holdout} is not a share of the images; give 0 or more, below 1")
    match config:
        case BuiltinData():
            train, val, notice = *_open_builtin(config), None
        case FolderData():
            train, val, notice = open_folder(config)
        case ParquetData():
            # `datasets` and pyarrow take half a second to import: only who needs them pays.
            from dino_lightning.data.parquet import open_parquet

            train, val, notice = open_parquet(config)
        case TorchvisionData():
            from dino_lightning.data.named import open_torchvision

            train, val, notice = open_torchvision(config)
        case _:
            raise TypeError(f"no reader for {type(config).__name__}")
    opened = Sources(train, val, notice)
    return opened if val is not None or train.labels is None else hold_out(opened, share=config.holdout, seed=seed)


def _open_builtin(config: BuiltinData) -> tuple[ImageSource, ImageSource]:
    from dino_lightning.data.builtin import BuiltinImages

    options = {"image_size": config.image_size, "draw_seed": config.draw_seed}
    return (
        BuiltinImages("train", images=config.train_images, **options),
        BuiltinImages("val", images=config.val_images, **options),
    )


def hold_out(opened: Sources, *, share: float, seed: int) -> Sources:
    """Move `share` of the labelled training images to `val`; the notice says so."""
    labels = opened.train.labels
    assert labels is not None
    held = held_out(labels, share=share, seed=seed)
    before = f"{opened.notice}; " if opened.notice else ""
    if not held.any():
        return Sources(opened.train, None, f"{before}no validation split and nothing held out: no k-NN evaluation")
    notice = f"{before}no validation split: {share:.0%} of the images ({held.sum()}) are held out as k-NN queries"
    train, val = (Part(opened.train, indices=np.flatnonzero(mask)) for mask in (~held, held))
    return Sources(train, val, notice)


def held_out(labels: np.ndarray, *, share: float, seed: int) -> np.ndarray:
    """Mask (n,) of a stratified draw: `share` of each class, of two images or more at least one held and one left.

    Images labelled -1 stay. The draw depends on `labels`, `share` and `seed` only, so every process agrees.
    """
    generator = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels[labels >= 0]):
        members = np.flatnonzero(labels == label)
        count = min(max(round(share * len(members)), 1), len(members) - 1) if share > 0 else 0
        held[generator.permutation(members)[:count]] = True
    return held
