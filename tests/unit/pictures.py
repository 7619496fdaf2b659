"""Pictures that can be told apart, on disk, and what every source of images promises: for the tests of sources."""

import io
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

from dino_lightning.data.sources import ImageSource


def picture(number: int, *, size: int = 6, mode: str = "RGB") -> Image.Image:
    """A picture that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def write(path: Path, number: int = 0, *, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number, mode=mode).save(path)
    return path


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, format="png")
    return buffer.getvalue()


def numbers(source: ImageSource, *, among: int = 60) -> list[int]:
    """Which `picture` each image of the source is."""
    known = {picture(number).tobytes(): number for number in range(among)}
    return [known[source[i][0].tobytes()] for i in range(len(source))]


def check_consistent(source: ImageSource) -> None:
    """What any source promises: RGB, labels that agree with `labels`, and the same from a copy in a worker."""
    copy = pickle.loads(pickle.dumps(source))
    assert len({source.describe(i) for i in range(len(source))}) == len(source)
    for i in range(len(source)):
        image, label = source[i]
        assert image.mode == "RGB"
        assert isinstance(label, int)
        assert label == (-1 if source.labels is None else source.labels[i])
        assert (copy[i][0].tobytes(), copy[i][1]) == (image.tobytes(), label)
    if source.labels is not None:
        assert source.labels.dtype == np.int64
        assert source.classes is not None
        assert source.labels.max() < len(source.classes)
