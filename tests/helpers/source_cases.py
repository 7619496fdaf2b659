"""Distinguishable images, and checks that every image source must pass, for the tests of sources."""

import io
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

from dino_lightning.config import DataConfig
from dino_lightning.data.decode import Decoder
from dino_lightning.data.sources import ImageSource


def picture(number: int, *, size: int = 6, mode: str = "RGB") -> Image.Image:
    """An image that is different for each number."""
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


def decoded(source: ImageSource, index: int) -> Image.Image:
    """The image as training decodes it."""
    return Decoder(DataConfig()).pil(source.read(index))


def numbers(source: ImageSource, *, among: int = 60) -> list[int]:
    """The number of the `picture` for each image of the source."""
    known = {picture(number).tobytes(): number for number in range(among)}
    return [known[decoded(source, i).tobytes()] for i in range(len(source))]


def check_consistent(source: ImageSource) -> None:
    """Check what every source must provide: RGB images, labels with names, and the same from a pickled copy."""
    assert isinstance(source, ImageSource)
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy) == len(source)
    assert copy.classes == source.classes
    assert len({source.describe(i) for i in range(len(source))}) == len(source)
    for i in range(len(source)):
        image = decoded(source, i)
        assert image.mode == "RGB"
        assert decoded(copy, i).tobytes() == image.tobytes()
        assert copy.describe(i) == source.describe(i)
    assert copy.fingerprint() == source.fingerprint()
    assert (source.labels is None) == (source.classes is None)
    if source.labels is not None:
        assert source.classes is not None
        assert source.labels.dtype == np.int64
        assert source.labels.shape == (len(source),)
        assert source.labels.max() < len(source.classes)
        np.testing.assert_array_equal(copy.labels, source.labels)
