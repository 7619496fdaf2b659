"""A small folder in the layout of Pascal VOC: images with one mask each."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_voc(root: Path, *, names: tuple[str, ...] = ("2007_1", "2007_2", "2008_3"), size: tuple[int, int] = (12, 8)):
    """Write images of `size` (width, height) with one mask each; returns the folder."""
    for folder in ("JPEGImages", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    for i, name in enumerate(names):
        Image.new("RGB", size, (40 * i, 90, 120)).save(root / "JPEGImages" / f"{name}.jpg")
        labels = np.zeros(size[::-1], np.uint8)
        labels[1:4, 2:6], labels[1, 2:6] = i + 1, 255
        mask = Image.fromarray(labels).convert("P")
        mask.putpalette([value for number in range(256) for value in (number, 255 - number, 7)])
        mask.save(root / "SegmentationClass" / f"{name}.png")
    return root
