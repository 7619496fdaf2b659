"""Files of steps whose loss or gradient was not finite: `nonfinite/stepNNNNNN-rankR.pt`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_lightning.checkpoints.safe_read import read_pickle
from dino_lightning.errors import UserError
from dino_lightning.runtime.files import atomic_file

FORMAT = "dino-lightning step 1"
CONTENT: dict[str, type | tuple[type, ...]] = {
    "what": str,
    "configuration": dict,
    "precision": str,
    "step": int,
    "epoch": int,
    "batch_index": int,
    "seed": int,
    "rank": int,
    "world_size": int,
    "loss": float,
    "crops": (list, type(None)),
    "labels": (Tensor, type(None)),
    "random": dict,
    "state": dict,
    "ranges": dict,
    "schedules": dict,
    "lengths": dict,
}
"""`what` happened; the micro-batch of this rank and its loss; the random states before its forward pass; the weights
before the step (`state`); the ranges of its activations. `crops` is None if the images were no longer available."""


def write_step(path: Path, content: dict[str, Any]) -> None:
    """Write the file atomically. Raises `OSError`."""
    assert content.keys() == CONTENT.keys(), content.keys() ^ CONTENT.keys()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def read_step(path: Path) -> dict[str, Any]:
    """The content, on the CPU. Raises `UserError` for any other file; no code in it is run."""
    content = read_pickle(path, source=str(path))
    if content.get("format") != FORMAT:
        raise UserError(f"{path} is not a step that a run has saved in its folder nonfinite/.")
    for name, kind in CONTENT.items():
        if not isinstance(content.get(name, ...), kind):
            raise UserError(f"{path} is damaged: {name} is {type(content.get(name)).__name__}.")
    return content
