"""Code shared by the examples: command-line options, images, features."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dino_lightning import embed
from dino_lightning.config import BuiltinData
from dino_lightning.data.sources.builtin import BuiltinImages
from dino_lightning.evaluation.embedding.output import Embeddings

UNTRAINED = "untrained:vit_micro"
BUILTIN_SIZE = 32
"""Side of the built-in images (pixels)."""


def parser(about: str | None, *, output: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all examples have."""
    words = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--path", help="folder, list, archive or parquet files; default: the built-in images")
    words.add_argument("--checkpoint", help="a run, a weights file or timm:NAME; default: the newest run in outputs/")
    words.add_argument("--output", type=Path, default=Path("outputs", output), help="picture file (%(default)s)")
    return words


def features_of(options: argparse.Namespace, images: Any = None, *, features: str = "class") -> Embeddings:
    """Return features of `images`; by default of the images at `--path`, or of built-in images with their classes."""
    checkpoint, size = options.checkpoint or newest_run(), None
    if checkpoint == UNTRAINED:
        print("There is no run in outputs/, so the network is untrained; `python train.py` trains a better one.")
        size = 96 if options.path else BUILTIN_SIZE
    builtin = BuiltinData(train_images=240, image_size=BUILTIN_SIZE, num_workers=0)
    if images is None:
        images = options.path or builtin
    split = "train" if images is builtin else "all"
    found = embed(images, checkpoint, features=features, image_size=size, split=split)
    print(f"{len(found)} images, {found.features.shape[1]} features each; {len(found.bad)} could not be read")
    return found


def newest_run() -> str:
    """Return the folder of the newest finished run, or an untrained network."""
    runs = sorted(Path("outputs").glob("*/teacher.safetensors"), key=lambda file: file.stat().st_mtime)
    return str(runs[-1].parent) if runs else UNTRAINED


def directions(features_ND: np.ndarray, *, around: np.ndarray | None = None) -> np.ndarray:
    """Center features (by the mean of `around`, if given) and normalize them: dot products are cosine similarities."""
    center_D = (features_ND if around is None else around).mean(axis=0)
    away_ND = features_ND - center_D
    return away_ND / np.linalg.norm(away_ND, axis=1, keepdims=True).clip(1e-12)


def drawn(count: int) -> list[Image.Image]:
    """Return `count` built-in images."""
    source = BuiltinImages("train", images=count, image_size=BUILTIN_SIZE, draw_seed=0)
    return [Image.fromarray(source.read(i)) for i in range(count)]


def square(image: Image.Image) -> Image.Image:
    """Return the center crop at the size of a cell in a sheet."""
    return ImageOps.fit(image.convert("RGB"), (96, 96))


def save(picture: Image.Image, path: Path) -> None:
    """Save the picture and print its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    print(f"Picture: {path.absolute()}")
