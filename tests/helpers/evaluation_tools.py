"""Small networks and tasks for the tests of evaluations."""

from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from lightning import Fabric
from torch import nn

from dino_lightning.config import BuiltinData, ImagesConfig, ViTConfig
from dino_lightning.data.sources import Splits, open_sources
from dino_lightning.evaluation.context import EvalContext, Task
from dino_lightning.models.backbones import build_backbone
from dino_lightning.models.frozen import FrozenNetwork

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def tiny_network(image_size: int = 32, *, seed: int = 0, **vit: Any) -> FrozenNetwork:
    """An untrained ViT with two blocks and 8-pixel patches; the same seed gives the same weights."""
    config = ViTConfig(**{"width": 32, "depth": 2, "heads": 2, "patch_size": 8, "drop_path_rate": 0.0, **vit})

    def rebuild(**_: Any) -> nn.Module:
        return build_backbone(config, image_size=image_size, drop_path=False)

    return _network(rebuild, f"vit{seed}", size=image_size, seed=seed)


def timm_network(name: str, *, image_size: int = 32, seed: int = 0, **arguments: Any) -> FrozenNetwork:
    """An untrained network of timm."""

    def rebuild(**more: Any) -> nn.Module:
        return timm.create_model(name, num_classes=0, **arguments, **more)

    return _network(rebuild, name, size=image_size, seed=seed)


def tiny_task(
    tmp_path: Path, network: FrozenNetwork, *, data: ImagesConfig, save_pictures: bool = True, **task: Any
) -> Task:
    """A task in one process on the CPU, with output in `tmp_path / "out"`.

    Compressing large pictures takes longer than a small evaluation; `save_pictures=False` draws them without saving.
    """
    context = EvalContext(Fabric(accelerator="cpu", devices=1), show_progress=False)
    result = Task(network, data, context, tmp_path / "out", **task)
    if isinstance(data, BuiltinData):
        result.__dict__["splits"] = _drawn(repr(data), result.seed)
    if not save_pictures:
        result.__dict__["save_picture"] = lambda *_, **__: None
    return result


@cache
def _drawn(data: str, seed: int) -> Splits:
    """Built-in images, which take long to draw, for all tests with these settings."""
    return open_sources(eval(data), seed=seed)


def _network(rebuild: Any, name: str, *, size: int, seed: int) -> FrozenNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = rebuild().eval().requires_grad_(False)
    return FrozenNetwork(
        backbone, name, f"{name}-{seed}", mean=MEAN, std=STD, resize=size * 8 // 7, size=size, rebuild=rebuild
    )
