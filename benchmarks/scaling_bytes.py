"""Bytes sent and stored in training on many GPUs, counted in the real modules without allocating their weights.

The bytes sent are those of one GPU in one step; it receives the same number of bytes.
"""

from collections.abc import Iterable
from functools import cache

import torch
from torch import nn

from dino_lightning.config import AdamWConfig, DINOConfig, FolderData, TrainConfig, ViTConfig
from dino_lightning.config.registry import backbone_config
from dino_lightning.methods.student_teacher import StudentTeacher
from dino_lightning.runtime.sharding import placement
from dino_lightning.training.build import build_method

FLOAT_BYTES = 4
"""Size of a weight, a gradient or a moment."""


@cache
def on_paper(name: str) -> tuple[ViTConfig, StudentTeacher]:
    """The method with the original's head on the meta device, without memory for its weights."""
    backbone = backbone_config(name)
    assert isinstance(backbone, ViTConfig)
    data, optim = FolderData(path="none"), AdamWConfig()
    config = TrainConfig(backbone=backbone, method=DINOConfig(), data=data, optim=optim, output_dir="none")
    with torch.device("meta"):
        return backbone, build_method(config)


def all_reduce(size: float, *, gpus: int) -> float:
    """Bytes sent in a ring all-reduce: twice the size, except for the GPU's own part."""
    return 2 * (gpus - 1) / gpus * size


def ddp_bytes(student: nn.Module, *, gpus: int, element: int = FLOAT_BYTES) -> float:
    """Bytes sent to average the gradients."""
    return all_reduce(element * numbers(trained(student)), gpus=gpus)


def gather_bytes(parameters: Iterable[nn.Parameter], *, gpus: int, element: int = FLOAT_BYTES) -> float:
    """Bytes sent in an all-gather: each GPU sends its slices to all others. A reduce-scatter sends the same number.

    All slices have the size of the largest, because FSDP pads the others.
    """
    return float((gpus - 1) * element * sum(slice_numbers(parameter, gpus=gpus) for parameter in parameters))


def slice_numbers(parameter: nn.Parameter, *, gpus: int) -> int:
    """Number of elements in the largest slice of a parameter."""
    cut = placement(parameter, ranks=gpus)
    rows = parameter.shape[cut.dim if cut else 0]
    return -(-rows // gpus) * (parameter.numel() // rows)


def fsdp_bytes(method: StudentTeacher, *, gpus: int, element: int = FLOAT_BYTES) -> dict[str, float]:
    """Purpose -> bytes sent."""
    weights, options = list(method.student.parameters()), {"gpus": gpus, "element": element}
    return {
        "teacher": gather_bytes(method.teacher.parameters(), **options),
        "forward": gather_bytes(weights, **options),
        "backward": gather_bytes(weights, **options),
        "gradients": gather_bytes(trained(method.student), **options),
        "norms": all_reduce(element * len(trained(method.student)), gpus=gpus),
    }


def small_bytes(prototypes: int, *, gpus: int, element: int = FLOAT_BYTES) -> dict[str, float]:
    """Bytes sent for the center with its number of rows, and for the loss with three flags."""
    return {"center": all_reduce(element * (prototypes + 1), gpus=gpus), "loss": all_reduce(4 * element, gpus=gpus)}


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters with a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def numbers(parameters: Iterable[nn.Parameter]) -> int:
    """Number of weights in these parameters."""
    return sum(parameter.numel() for parameter in parameters)


def state_bytes(method: StudentTeacher, *, slices: int = 1) -> float:
    """Bytes on one GPU between steps: both networks, and gradients and two moments of the trained weights."""
    student, teacher = (list(network.parameters()) for network in (method.student, method.teacher))
    stored = [*student, *teacher, *3 * trained(method.student)]
    return float(FLOAT_BYTES * sum(slice_numbers(parameter, gpus=slices) for parameter in stored))
