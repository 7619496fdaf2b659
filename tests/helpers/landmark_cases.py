"""Small datasets of generated images in the layouts of revisited Oxford and of Copydays."""

import pickle
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from dino_lightning.config import BuiltinData, CopydaysData, RevisitedData
from dino_lightning.data.sources.builtin import open_builtin

LANDMARKS, VIEWS = 6, 4
SIZES = (64, 48), (48, 64)
"""(width, height) of the views; one view has another size."""


@cache
def drawings() -> list[Image.Image]:
    """80 distinct images of 64 x 64 pixels."""
    source: Any = open_builtin(BuiltinData(train_images=80, val_images=1, image_size=64)).train
    return [Image.fromarray(np.asarray(source.read(i))) for i in range(len(source))]


def write_revisited(root: Path, *, name: str = "roxford5k", protocol: int = 2) -> RevisitedData:
    """Write a query and `VIEWS` images of each landmark: one easy, one hard, one junk and one not in the ground truth.

    The query is the landmark with a gray border; its box is the landmark.
    """
    jpg = root / name / "jpg"
    jpg.mkdir(parents=True)
    images, queries, gnd = [], [], []
    for landmark, picture in enumerate(drawings()[:LANDMARKS]):
        for view in range(VIEWS):
            size = SIZES[view % 2] if (landmark, view) != (0, 0) else (70, 33)
            turned = picture.resize(size).rotate(4 * view, fillcolor=(128, 128, 128))
            images.append(f"place{landmark}_{view}")
            turned.save(jpg / f"{images[-1]}.jpg", quality=95)
        bordered = Image.new("RGB", (100, 100), (128, 128, 128))
        bordered.paste(picture, (20, 30))
        queries.append(f"query{landmark}")
        bordered.save(jpg / f"{queries[-1]}.jpg", quality=95)
        first = landmark * VIEWS
        matches = {"easy": [first], "hard": [first + 1], "junk": [first + 2], "bbx": [19.6, 30, 84.2, 94.4]}
        gnd.append(matches if landmark else {**matches, "easy": []})  # the first query has no easy image
    truth = {"imlist": images, "qimlist": queries, "gnd": gnd}
    write_truth(root / name / f"gnd_{name}.pkl", truth, protocol=protocol)
    return RevisitedData(path=str(root), name=name, num_workers=0)


def write_truth(path: Path, truth: Any, *, protocol: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(truth, protocol=protocol))


def write_copydays(root: Path, *, photographs: int = 5) -> CopydaysData:
    """Write originals, two strong copies of each except the last (blurred, rotated), and folders of other copies."""
    pictures = drawings()[:photographs]
    for folder in ("original", "strong", "jpegqual/20", "jpegqual/5", "crops/10"):
        (root / folder).mkdir(parents=True)
    for number, picture in enumerate(pictures):
        name = f"20{number:02}"
        picture.save(root / "original" / f"{name}00.jpg", quality=95)
        for quality in (20, 5):
            picture.save(root / "jpegqual" / str(quality) / f"{name}00.jpg", quality=quality)
        picture.crop((4, 4, 60, 60)).save(root / "crops/10" / f"{name}00.jpg", quality=95)
        if number < photographs - 1:
            picture.filter(ImageFilter.GaussianBlur(3)).save(root / "strong" / f"{name}01.jpg", quality=95)
            picture.rotate(180).save(root / "strong" / f"{name}02.jpg", quality=95)
    return CopydaysData(path=str(root), num_workers=0)


def write_others(folder: Path, *, count: int = 12, start: int = 30) -> Path:
    """Write images that are in neither dataset, some of them in a subfolder."""
    for i, picture in enumerate(drawings()[start : start + count]):
        target = folder / "below" if i % 3 == 0 else folder
        target.mkdir(parents=True, exist_ok=True)
        picture.save(target / f"other{i:02}.png")
    return folder
