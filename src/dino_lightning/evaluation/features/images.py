"""Images as evaluations see them: each once, with its label, and a broken one named and left out.

Training replaces an image that cannot be read by the next; here that would count the next one twice.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dino_lightning.config import CropsConfig, DataConfig
from dino_lightning.data.bad_images import UNREADABLE, BadImages, why_unreadable
from dino_lightning.data.batches import WorkerError
from dino_lightning.data.crops import EvalView
from dino_lightning.data.decode import Decoder
from dino_lightning.data.sources.base import ImageSource, content_digest
from dino_lightning.errors import UserError
from dino_lightning.models.frozen import FrozenNetwork

BROKEN = -2
"""The label of an image that could not be read; its pixels are zeros. -1 is that of an image without a label."""

View = Callable[[Image.Image | Tensor], Tensor]
"""Decoded image -> what the network takes, (C, H, W)."""


class ViewedImages(Dataset[tuple[Tensor, int]]):
    """(image, label) of a source through a view; of an unreadable image (zeros of `blank`, `BROKEN`)."""

    def __init__(
        self,
        source: ImageSource,
        view: View,
        *,
        blank: tuple[int, int, int],
        config: DataConfig | None = None,
        bad_images: Path | None = None,
    ) -> None:
        self.source, self.view, self.blank = source, view, blank
        config = config or DataConfig()
        self.decoder = Decoder(config)
        self.decode = self.decoder.pil if config.channels in (1, 3) else self.decoder.pixels
        self.decoding = repr((config.channels, config.value_range, config.nan_value, config.apply_exif_rotation))
        self.bad = BadImages(
            bad_images, images=len(source), on_error=config.on_error, max_bad_share=config.max_bad_share
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image = self.decode(self.source.read(index))
        except UNREADABLE as error:
            self.bad.note(self.source.describe(index), why_unreadable(error))
            return torch.zeros(self.blank), BROKEN
        labels = self.source.labels
        return self.view(image), -1 if labels is None else int(labels[index])

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]] | WorkerError:
        """A batch, uncollated: see `collated`. A loader process has no other way to tell a user's error in one line."""
        try:
            return [self[index] for index in indices]
        except UserError as error:
            return WorkerError(str(error))


def collated(samples: list[tuple[Tensor, int]] | WorkerError) -> list[Tensor] | WorkerError:
    """`collate_fn` for a loader of `ViewedImages`: [images (B, C, H, W), labels (B,)], or what went wrong."""
    return samples if isinstance(samples, WorkerError) else default_collate(samples)


class ImageFiles:
    """An `ImageSource` of the files at `paths`, without labels."""

    classes: list[str] | None = None
    labels: np.ndarray | None = None

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = np.array([str(path) for path in paths], dtype=np.str_)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        """The file's bytes."""
        return Path(str(self.paths[index])).read_bytes()

    def describe(self, index: int) -> str:
        """The path."""
        return str(self.paths[index])

    def fingerprint(self) -> str:
        """Of paths, sizes and times of change; a file that is missing counts as empty."""
        states = (_state(Path(str(path))) for path in self.paths)
        return content_digest(*(f"{path}\0{state}".encode() for path, state in zip(self.paths, states, strict=True)))


def center_view(network: FrozenNetwork, *, resize: int | None = None, size: int | None = None) -> EvalView:
    """Shorter side to `resize` (bicubic), center of `size`, normalized; by default as the checkpoint says.

    With `size` alone, the ratio of the two stays the checkpoint's.
    """
    if size is None:
        size = network.size
        resize = resize or network.resize
    resize = resize or round(size * network.resize / network.size)
    return EvalView(CropsConfig(mean=network.mean, std=network.std, eval_resize=resize, eval_size=size))


def _state(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        return ""
    return f"{stat.st_size}\0{stat.st_mtime_ns}"
