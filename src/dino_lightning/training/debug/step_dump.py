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
"""`what` happened; the micro-batch of this rank as the step got it, with its loss; the random states before its forward
pass; the weights before the step; the ranges of its activations. `crops` is None where the images were gone."""
LENGTHS = ("num_training_batches", "accumulate_grad_batches", "total_steps")


def write_step(path: Path, content: dict[str, Any]) -> None:
    """Write the file, whole or not at all. Raises `OSError`."""
    assert content.keys() == CONTENT.keys(), content.keys() ^ CONTENT.keys()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def read_step(path: Path) -> dict[str, Any]:
    """The content, on the CPU. Raises `UserError` for any other file; no code in it is run."""
    content = read_pickle(path, source=str(path))
    if content.get("format") != FORMAT:
        raise UserError(f"{path} is no step that a run has saved to its folder nonfinite/.")
    for name, kind in CONTENT.items():
        if not isinstance(content.get(name, ...), kind):
            raise UserError(f"{path} is damaged: {name} is {type(content.get(name)).__name__}.")
    if content["crops"] is not None:
        _check_crops(path, content["crops"], content["labels"])
    for name, table in (("state", content["state"]), ("random", content["random"])):
        if not all(isinstance(key, str) and isinstance(value, Tensor | None) for key, value in table.items()):
            raise UserError(f"{path} is damaged: {name} holds something besides tensors.")
    if not all(isinstance(content["lengths"].get(name), int) for name in LENGTHS):
        raise UserError(f"{path} is damaged: lengths lacks one of {', '.join(LENGTHS)}.")
    if not all(isinstance(value, float) for value in content["schedules"].values()):
        raise UserError(f"{path} is damaged: schedules holds something besides numbers.")
    numbers = [ranges.get(name) for ranges in content["ranges"].values() for name in ("low", "high", "count", "bad")]
    if not all(isinstance(number, int | float) for number in numbers):
        raise UserError(f"{path} is damaged: ranges are not those of activations.")
    return content


def _check_crops(path: Path, crops: list[Any], labels: Tensor | None) -> None:
    images = all(isinstance(crop, Tensor) and crop.ndim == 4 and crop.is_floating_point() for crop in crops)
    if not images or len(crops) < 2 or len({len(crop) for crop in crops}) != 1 or not len(crops[0]):
        raise UserError(f"{path} is damaged: crops are not images (B, channels, size, size) of one B.")
    if labels is not None and (labels.shape != (len(crops[0]),) or labels.dtype != torch.int64):
        raise UserError(f"{path} is damaged: labels are not one whole number for each image.")
