"""Files of steps whose loss or gradient was not finite: `nonfinite/stepNNNNNN-rankR.pt`."""

from pathlib import Path
from typing import Any

import torch

from dino_lightning.checkpoints.safe_read import read_pickle
from dino_lightning.errors import UserError
from dino_lightning.runtime.files import atomic_file

FORMAT = "dino-lightning step 1"


def write_step(path: Path, content: dict[str, Any]) -> None:
    """Write the file atomically. Raises `OSError`.

    The content: `what` happened; the micro-batch of this rank and its loss; the random states before its forward pass;
    the weights before the step (`state`); the ranges of its activations. `crops` is None if the images were no longer
    available.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def read_step(path: Path) -> dict[str, Any]:
    """The content, on the CPU. Raises `UserError` for any other file; no code in it is run."""
    content = read_pickle(path, source=str(path))
    if content.get("format") != FORMAT:
        raise UserError(f"{path} is not a step that a run has saved in its folder nonfinite/.")
    return content
