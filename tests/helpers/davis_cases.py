"""A generated DAVIS dataset: videos of colored disks on noise, with masks."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dino_lightning.config import DavisData

HEIGHT, WIDTH, FRAMES = 66, 100, 6
PALETTE = [0, 0, 0, 200, 10, 20, 10, 200, 20, *[7] * (253 * 3)]


def write_davis(
    root: Path, *, sequences: dict[str, int] | None = None, height: int = HEIGHT, width: int = WIDTH, **config: Any
) -> DavisData:
    """Write `sequences` (name -> number of frames) of two objects that move to the right, listed for both years."""
    sequences = sequences or {"cow": FRAMES, "bus": FRAMES + 1}
    for year in ("2016", "2017"):
        (root / "ImageSets" / year).mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / year / "val.txt").write_text("\n".join(sequences) + "\n")
    for number, (name, frames) in enumerate(sequences.items()):
        for index in range(frames):
            labels = disks(height, width, shift=3 * index)
            noise = np.random.default_rng(number).integers(0, 60, (height, width, 3))
            colors = np.array([(90, 90, 90), (190, 40, 40), (40, 40, 190)])
            pixels = (noise + colors[labels]).astype(np.uint8)
            write_frame(root, name, index, Image.fromarray(pixels))
            write_mask(root, name, index, labels)
    return DavisData(path=str(root), num_workers=0, **config)


def disks(height: int, width: int, *, shift: int) -> np.ndarray:
    """Labels of two disks, the second partly in front of the first."""
    y, x = np.mgrid[:height, :width]
    first = (y - height * 0.4) ** 2 + (x - width * 0.3 - shift) ** 2 < (height * 0.3) ** 2
    second = (y - height * 0.7) ** 2 + (x - width * 0.5 - shift) ** 2 < (height * 0.2) ** 2
    return np.where(second, 2, first).astype(np.uint8)


def frame_path(root: Path, name: str, index: int) -> Path:
    return root / "JPEGImages" / "480p" / name / f"{index:05}.jpg"


def mask_path(root: Path, name: str, index: int) -> Path:
    return root / "Annotations" / "480p" / name / f"{index:05}.png"


def write_frame(root: Path, name: str, index: int, image: Image.Image) -> None:
    path = frame_path(root, name, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)


def write_mask(root: Path, name: str, index: int, labels: np.ndarray, *, palette: bool = True) -> None:
    path = mask_path(root, name, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels.astype(np.uint8))
    if palette:
        image.putpalette(PALETTE)
    image.save(path)
