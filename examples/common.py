"""What the examples share: the words of their command lines, the images, the features."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dino_lightning import embed
from dino_lightning.config import BuiltinData
from dino_lightning.data.sources.builtin import BuiltinImages
from dino_lightning.evaluation.embedding.result import Embeddings

UNTRAINED = "untrained:vit_micro"
BUILTIN_SIZE = 32
"""Side of the built-in images (pixels)."""


def parser(about: str | None, *, output: str) -> argparse.ArgumentParser:
    """The words that all examples know."""
    words = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--path", help="folder, list, archive or parquet files of your images; default: built-in images")
    words.add_argument("--checkpoint", help="a run, a file of weights, timm:NAME; default: the newest run in outputs/")
    words.add_argument("--output", type=Path, default=Path("outputs", output), help="the picture (%(default)s)")
    return words


def features_of(options: argparse.Namespace, images: Any = None, *, features: str = "class") -> Embeddings:
    """Features of `images`, by default those at `--path`, or else some built-in ones with their classes."""
    checkpoint, size = options.checkpoint or newest_run(), None
    if checkpoint == UNTRAINED:
        print("There is no run in outputs/, so the network is untrained; `python train.py` makes a better one.")
        size = 96 if options.path else BUILTIN_SIZE
    builtin = BuiltinData(train_images=240, image_size=BUILTIN_SIZE, num_workers=0)
    if images is None:
        images = options.path or builtin
    split = "train" if images is builtin else "all"
    found = embed(images, checkpoint, features=features, image_size=size, split=split)
    print(f"{len(found)} images, {found.features.shape[1]} features each; {len(found.bad)} could not be read")
    return found


def newest_run() -> str:
    """The folder of the last run that came to its end, or an untrained network."""
    runs = sorted(Path("outputs").glob("*/teacher.safetensors"), key=lambda file: file.stat().st_mtime)
    return str(runs[-1].parent) if runs else UNTRAINED


def directions(features_ND: np.ndarray, *, around: np.ndarray | None = None) -> np.ndarray:
    """Features seen from their mean, or that of others, at length 1: dot products are similarities from -1 to 1."""
    center_D = (features_ND if around is None else around).mean(axis=0)
    away_ND = features_ND - center_D
    return away_ND / np.linalg.norm(away_ND, axis=1, keepdims=True).clip(1e-12)


def drawn(count: int) -> list[Image.Image]:
    """Built-in pictures."""
    source = BuiltinImages("train", images=count, image_size=BUILTIN_SIZE, draw_seed=0)
    return [Image.fromarray(source.read(i)) for i in range(count)]


def square(image: Image.Image) -> Image.Image:
    """The centre, at the size of a cell in a sheet."""
    return ImageOps.fit(image.convert("RGB"), (96, 96))


def save(picture: Image.Image, path: Path) -> None:
    """Write the picture and say where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    print(f"Picture: {path.absolute()}")
