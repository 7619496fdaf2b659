"""Weights of any origin in and out, and the checkpoints of a run on disk."""

from dino_lightning.checkpoints.description import Description
from dino_lightning.checkpoints.export import export_backbone
from dino_lightning.checkpoints.load import load_network, with_fresh_weights

__all__ = ["Description", "export_backbone", "load_network", "with_fresh_weights"]
