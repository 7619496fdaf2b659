"""Load a frozen backbone without installation: `torch.hub.load("OWNER/dino-lightning", "backbone", checkpoint=…)`.

The dependencies of dino-lightning must be installed. In a checkout: `torch.hub.load(FOLDER, "backbone",
source="local", checkpoint=…)`.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

dependencies = ["torch", "timm", "hydra", "lightning", "safetensors"]


def backbone(checkpoint: str, *, checkpoint_key: str | None = None) -> nn.Module:
    """Return the network: normalized images (B, C, H, W) -> features (B, D); in eval mode, without gradients.

    `checkpoint` and `checkpoint_key` are those of `dino eval`: the folder of a run, a file of weights, `timm:NAME`,
    `hf:OWNER/NAME`, `untrained:vit_small`. Raises `ValueError` if `checkpoint` is none of these.
    """
    return _network(checkpoint, checkpoint_key).backbone


def transform(checkpoint: str, *, checkpoint_key: str | None = None) -> Callable[[Any], Any]:
    """Return the preprocessing of `checkpoint`: PIL image -> tensor (C, size, size)."""
    network = _network(checkpoint, checkpoint_key)
    from dino_lightning.evaluation.features.images import center_view

    return center_view(network)


def _network(checkpoint: str, key: str | None) -> Any:
    source = str(Path(__file__).resolve().parent / "src")
    if source not in sys.path:
        sys.path.insert(0, source)
    from dino_lightning.checkpoints import load_network

    return load_network(checkpoint, key=key)
