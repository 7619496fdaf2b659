"""A source of generated images that counts how often they are read, for the tests of the cache."""

import io
import multiprocessing
import time

import numpy as np
from PIL import Image

from dino_lightning.config import DataConfig
from dino_lightning.data.cache import cached
from dino_lightning.data.decode import Decoder
from dino_lightning.data.sources.base import ImageSource, content_digest

SIZES = [(40, 30), (30, 40), (16, 16), (20, 100), (17, 16), (100, 20), (15, 90)]
"""(width, height) of the images, with shorter sides below and above `RESIZE`."""
RESIZE = 16
FORK = multiprocessing.get_context("fork")


class GeneratedImages:
    """PNGs of smooth colors, generated when they are read, after a delay; the `broken` ones are truncated."""

    def __init__(self, total=70, *, broken=(), seconds=0.0, name="generated"):
        self.total, self.broken, self.seconds, self.name = total, tuple(broken), seconds, name
        self.labels, self.classes = np.arange(total) % 2, ["even", "odd"]
        self.reads = FORK.Value("q", 0)

    def __len__(self):
        return self.total

    def read(self, index):
        with self.reads.get_lock():
            self.reads.value += 1
        time.sleep(self.seconds)
        return encoded(index)[: 60 if index in self.broken else None]

    def describe(self, index):
        return f"{self.name} {index}.png"

    def fingerprint(self):
        return content_digest(self.name.encode())

    def __getstate__(self):
        return {**self.__dict__, "reads": None}


def picture(index):
    width, height = SIZES[index % len(SIZES)]
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(index + 3 * x + k * y) for k in range(3)]
    return Image.fromarray(np.uint8(127 + 120 * np.stack(waves, axis=-1)))


def encoded(index):
    buffer = io.BytesIO()
    picture(index).save(buffer, "PNG")
    return buffer.getvalue()


def expected(index):
    """The cached image computed with Pillow: shorter side 16, longer side in proportion, rounded down."""
    image = picture(index)
    short, long = sorted(image.size)
    if short > RESIZE:
        size = [RESIZE if side == short else int(RESIZE * long / short) for side in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    return np.asarray(image)


def settings(tmp_path, **others):
    return DataConfig(**{"cache": "disk", "cache_dir": str(tmp_path / "cache"), "cache_resize": RESIZE, **others})


def keep(source, config, *, bad_images=None, workers=0) -> ImageSource:
    return cached(source, config=config, decoder=Decoder(config), bad_images=bad_images, workers=workers)


def folders(tmp_path):
    return [path for path in (tmp_path / "cache" / "images").iterdir() if path.is_dir()]
