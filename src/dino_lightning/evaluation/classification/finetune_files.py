"""What a finetuning leaves on disk: the state it goes on from, and the final weights."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import nn

from dino_lightning.config import FinetuneEval
from dino_lightning.data.sources.base import content_digest
from dino_lightning.errors import UserError
from dino_lightning.evaluation.classification.splits import Labeled
from dino_lightning.evaluation.context import EvalContext, Task
from dino_lightning.runtime.collectives import world_size
from dino_lightning.runtime.files import atomic_file

State = dict[str, Any]
FREE = ("val_every_n_epochs",)
"""Settings that may change on the way: no weight depends on them."""


def settings_of(config: FinetuneEval, task: Task, images: Labeled) -> dict[str, Any]:
    """By their keys on the command line, all that the weights depend on: the same on every rank."""
    fabric = task.runtime.fabric
    names = json.dumps(images.classes).encode()
    data = content_digest(images.train.fingerprint().encode(), names) if task.runtime.is_main else ""
    return {
        "checkpoint": task.network.digest,
        "data": fabric.broadcast(data),
        "seed": task.seed,
        "trainer.devices": world_size(),
        "trainer.precision": str(fabric.strategy.precision.precision),
        **{f"eval.{key}": value for key, value in asdict(config).items() if key not in FREE},
    }


def write_state(path: Path, state: State) -> None:
    """Whole or not at all; the caller is the main process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        torch.save(state, file)


def read_state(path: Path, runtime: EvalContext, *, settings: dict[str, Any]) -> State | None:
    """The state on the CPU of every rank, read by the main process; None where there is none.

    Raises `UserError` where it cannot be read, or belongs to a training with other settings.
    """
    found: State | str | None = None
    if runtime.is_main and path.is_file():
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise anything; the other ranks must hear of it
            found = f"{path} is not a whole checkpoint ({type(error).__name__}); remove it to train anew."
    found = cast(State | str | None, runtime.fabric.broadcast(found))
    if isinstance(found, str):
        raise UserError(found)
    if found is None:
        return None
    kept = found["settings"]
    for key, value in settings.items():
        if kept.get(key) != value:
            raise UserError(
                f"{key}={value}: {path} belongs to a training with {key}={kept.get(key)}; set another "
                "output_dir, or remove the file."
            )
    return found


def export(model: nn.Module, path: Path, *, task: Task, classes: list[str], classifier: str, size: list[int]) -> None:
    """Weights by timm's names, and in the metadata what belongs to them.

    `classifier` is the name of the top layer. As JSON: `classes`, the names of its rows; `mean` and `std` of the
    images; `eval`, their shorter side and center (pixels); `network`, the architecture, by which `checkpoint=` takes
    the file, too.
    """
    resize, side = size
    described = task.network.description
    if described is not None:
        described = described | {"resize": resize, "size": side}
    values: dict[str, Any] = {
        "classes": classes,
        "mean": task.network.mean,
        "std": task.network.std,
        "eval": {"resize": resize, "size": side},
        **({} if described is None else {"network": described}),
    }
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt", "classifier": classifier} | {key: json.dumps(value) for key, value in values.items()}
    with atomic_file(path) as file:
        file.write(save(weights, metadata=metadata))
