"""What `embed` gives back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from dino_lightning.data.decode import Decoder
from dino_lightning.data.sources.base import ImageSource


@dataclass(frozen=True)
class Embeddings:
    """Features of N readable images, in the order in which their source has them."""

    features: np.ndarray
    """(N, D) float32."""
    names: list[str]
    """Path, place in the list, or whatever the source calls an image."""
    labels: list[str | None] | None
    """Name of the class, None for a single image without one; None where the images have no labels."""
    splits: list[str] | None
    """`train` or `val`; None where there are not both."""
    bad: dict[str, str]
    """Name -> reason of the images that could not be read and were left out."""
    output: Path | None
    """The file."""
    positions: np.ndarray
    """(N,) int64: the place of each among the images of its split, the bad ones counted."""
    sources: Mapping[str, ImageSource] = field(repr=False)
    """Split -> its images."""
    decoder: Decoder = field(repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def image(self, row: int) -> Image.Image:
        """The image of a row, read once more, in RGB or gray; for networks of 1 or 3 channels."""
        split = self.splits[row] if self.splits else next(iter(self.sources))
        return self.decoder.pil(self.sources[split].read(int(self.positions[row])))
