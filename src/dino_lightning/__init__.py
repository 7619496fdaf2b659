"""DINO: self-distillation with no labels, on PyTorch Lightning and Hydra."""

from dino_lightning.ops.memory import use_huge_pages

__version__ = "0.1.0"

use_huge_pages()
