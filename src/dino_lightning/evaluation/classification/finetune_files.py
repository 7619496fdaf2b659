"""The files of a finetuning: the settings that it resumes with, and the final weights."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from dino_lightning.config import FinetuneEval
from dino_lightning.data.sources.base import content_digest
from dino_lightning.errors import UserError
from dino_lightning.evaluation.classification.splits import LabeledSplits
from dino_lightning.evaluation.context import Task
from dino_lightning.runtime.collectives import world_size
from dino_lightning.runtime.files import atomic_file

CHANGEABLE = ("val_every_n_epochs",)
"""Settings that may change on resuming because the weights do not depend on them."""


def training_settings(config: FinetuneEval, task: Task, images: LabeledSplits) -> dict[str, Any]:
    """All settings that the weights depend on, by their keys on the command line; the same on every rank."""
    fabric = task.context.fabric
    names = json.dumps(images.classes).encode()
    data = content_digest(images.train.fingerprint().encode(), names) if task.context.is_main else ""
    return {
        "checkpoint": task.network.digest,
        "data": fabric.broadcast(data),
        "seed": task.seed,
        "trainer.devices": world_size(),
        "trainer.precision": str(fabric.strategy.precision.precision),
        **{f"eval.{key}": value for key, value in asdict(config).items() if key not in CHANGEABLE},
    }


def check_settings(saved: dict[str, Any], settings: dict[str, Any], *, path: Path) -> None:
    """Raise `UserError` if the file `path` belongs to a training with other settings."""
    for key, value in settings.items():
        if saved.get(key) != value:
            raise UserError(
                f"{key}={value}: {path} belongs to a training with {key}={saved.get(key)}; set another output_dir, or "
                "delete the file."
            )


def export(model: nn.Module, path: Path, *, task: Task, classes: list[str], classifier: str, size: list[int]) -> None:
    """Write the weights with timm's names, and metadata.

    The metadata are `classifier`, the name of the top layer, and as JSON: `classes`, the names of its outputs; `mean`
    and `std` of the images; `eval`, their shorter side and center crop (pixels); `network`, the architecture, so that
    `checkpoint=` can load the file.
    """
    resize, side = size
    network = task.network.description
    values: dict[str, Any] = {
        "classes": classes,
        "mean": task.network.mean,
        "std": task.network.std,
        "eval": {"resize": resize, "size": side},
        **({} if network is None else {"network": network | {"resize": resize, "size": side}}),
    }
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt", "classifier": classifier} | {key: json.dumps(value) for key, value in values.items()}
    with atomic_file(path) as file:
        file.write(save(weights, metadata=metadata))
