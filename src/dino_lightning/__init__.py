"""DINO: self-distillation with no labels, on PyTorch Lightning and Hydra."""

__version__ = "0.1.0"
