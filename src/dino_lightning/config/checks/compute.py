"""What the settings of `step` ask of network, devices and precision."""

import os
import shutil

from dino_lightning.config import TrainConfig, ViTConfig
from dino_lightning.errors import UserError
from dino_lightning.runtime.devices import trains_on_cpu

COMPILERS = ("g++", "clang++", "cl")


def check_step(config: TrainConfig) -> None:
    """Refuse settings that this run could not keep."""
    compute, vit = config.compute, isinstance(config.backbone, ViTConfig)
    on_cpu = trains_on_cpu(config.trainer.accelerator)
    packed = "backbone=vit_small or another ViT of conf/backbone"
    if compute.attention == "varlen":
        _need(vit, "compute.attention=varlen", packed)
        _need(compute.fused, "compute.attention=varlen", "compute.fused=true")
        _need(not on_cpu, "compute.attention=varlen", "a GPU")
        _need(
            str(config.trainer.precision) in ("bf16-mixed", "16-mixed"),
            "compute.attention=varlen",
            "trainer.precision=bf16-mixed",
        )
    if isinstance(config.backbone, ViTConfig) and config.backbone.drop_path == "subset":
        _need(compute.fused, "backbone.drop_path=subset", "compute.fused=true")
        # The number of crops differs from block to block, and each would be compiled by itself.
        _need(not compute.compile, "backbone.drop_path=subset", "compute.compile=false")
    if compute.compile and on_cpu:
        named = os.environ.get("CXX")
        found = any(shutil.which(name) for name in ([named] if named else COMPILERS))
        _need(found, "compute.compile=true", "a C++ compiler such as g++ on a CPU")


def _need(holds: bool, setting: str, other: str) -> None:
    if not holds:
        raise UserError(f"{setting} needs {other}.")
