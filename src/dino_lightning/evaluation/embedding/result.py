"""The result of `embed`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from dino_lightning.data.decode import Decoder
from dino_lightning.data.sources.base import ImageSource


@dataclass(frozen=True)
class Embeddings:
    """Features of N readable images, in the order of their source."""

    features: np.ndarray
    """(N, D) float32."""
    names: list[str]
    """Path, index in the list, or the name that the source gives to an image."""
    labels: list[str | None] | None
    """Name of the class, None for an unlabeled image; None instead of the list if all images are unlabeled."""
    splits: list[str] | None
    """`train` or `val`; None if there is only one split."""
    bad: dict[str, str]
    """Name -> reason of the unreadable images, which are left out."""
    output: Path | None
    """The file."""
    positions: np.ndarray
    """(N,) int64: the index of each image in its split, counting the unreadable ones."""
    sources: Mapping[str, ImageSource] = field(repr=False)
    """Split -> its images."""
    decoder: Decoder = field(repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def image(self, row: int) -> Image.Image:
        """The image of a row, read again, in RGB or gray; for networks with 1 or 3 channels."""
        split = self.splits[row] if self.splits else next(iter(self.sources))
        return self.decoder.pil(self.sources[split].read(int(self.positions[row])))
