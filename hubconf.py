"""`torch.hub.load("OWNER/dino-lightning", "backbone", checkpoint=…)`: a frozen backbone without an installation.

The packages that dino-lightning depends on must be there. In a checkout: `torch.hub.load(FOLDER, "backbone",
source="local", checkpoint=…)`.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

dependencies = ["torch", "timm", "hydra", "lightning", "safetensors"]


def backbone(checkpoint: str, *, checkpoint_key: str | None = None) -> nn.Module:
    """Images (B, C, H, W), normalised -> features (B, D); in eval mode, without gradients.

    `checkpoint` and `checkpoint_key` are those of `dino-eval`: a run's folder, a file of weights, `timm:NAME`,
    `hf:OWNER/NAME`, `untrained:vit_small`. Raises `ValueError` in one sentence for whatever is none of them.
    """
    return _network(checkpoint, checkpoint_key).backbone


def transform(checkpoint: str, *, checkpoint_key: str | None = None) -> Callable[[Any], Any]:
    """PIL image -> tensor (C, size, size), prepared as the weights of `checkpoint` want it."""
    network = _network(checkpoint, checkpoint_key)
    from dino_lightning.evaluation.features.images import center_view

    return center_view(network)


def _network(checkpoint: str, key: str | None) -> Any:
    source = str(Path(__file__).resolve().parent / "src")
    if source not in sys.path:
        sys.path.insert(0, source)
    from dino_lightning.checkpoints import load_network

    return load_network(checkpoint, key=key)
