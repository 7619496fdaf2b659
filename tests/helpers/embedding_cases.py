"""Image files and an independent computation of their features, for the tests of `evaluation.embedding`."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dino_lightning.checkpoints import load_network
from dino_lightning.data.sources.builtin import BuiltinImages

CHECKPOINT = "untrained:vit_micro"
SIZE = 32
"""Image size in pixels; the network's default of 224 would take 49 times as long."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pictures(count: int) -> list[np.ndarray]:
    """Distinct images (32, 32, 3) as uint8."""
    source = BuiltinImages("train", images=count, image_size=32, draw_seed=0)
    return [source.read(i) for i in range(count)]


def picture_files(folder: Path, count: int, *, classes: tuple[str, ...] = ()) -> list[Path]:
    """Write PNG files, in class folders if there are classes; returns their paths, sorted by name."""
    paths = []
    for i, pixels in enumerate(pictures(count)):
        path = folder / (classes[i * len(classes) // count] if classes else "") / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        paths.append(path)
    return paths


def expected_features(images: list[Path]) -> torch.Tensor:
    """Class tokens (N, D) with the paper's preprocessing: shorter side resized to 256/224, center crop, normalized."""
    backbone = load_network(CHECKPOINT).backbone
    rows = []
    for path in images:
        resized = Image.open(path).convert("RGB").resize((37, 37), Image.Resampling.BICUBIC)
        pixels = np.asarray(resized.crop((2, 2, 34, 34)), dtype=np.float32) / 255
        normalized = (pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
        rows.append(backbone(torch.from_numpy(normalized).permute(2, 0, 1)[None]))
    return torch.cat(rows)
