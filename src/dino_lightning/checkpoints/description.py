"""What must be known of weights besides their values: the architecture, and how its images are prepared."""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self, cast

import torch
from torch import nn

from dino_lightning.config import SCHEMAS, BackboneConfig, CropsConfig, TimmConfig, ViTConfig
from dino_lightning.errors import UserError
from dino_lightning.models.backbones import build_backbone

PAPER_CROPS = CropsConfig()
"""Preparation of images where a file says nothing of it: that of the original."""

LARGEST = 65_536
"""Numbers above it are damage: they would be loops of hours, or all memory."""
INVALID_DESCRIPTION = (KeyError, TypeError, AttributeError, ValueError)
"""What plain types raise that describe no network."""
WEIGHT_ARGUMENTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
"""Arguments of timm that name weights: none of the architecture, and a file must not make us read another one."""


@dataclass(frozen=True)
class Description:
    """A network without its weights. In plain types it stands in our checkpoints."""

    backbone: BackboneConfig
    image_size: int = PAPER_CROPS.global_size
    """Side for which a learned position embedding is made (pixels)."""
    mean: list[float] = field(default_factory=lambda: PAPER_CROPS.mean)
    std: list[float] = field(default_factory=lambda: PAPER_CROPS.std)
    """Of each channel, of values in 0 to 1."""
    resize: int = PAPER_CROPS.eval_resize
    """Shorter side of an evaluated image before the center crop (pixels)."""
    size: int = PAPER_CROPS.eval_size
    """Side of the center crop (pixels)."""

    @classmethod
    def of_run(cls, config: dict[str, Any]) -> Self:
        """From a run's configuration as plain types. Raises one of `UNSOUND` for anything else."""
        crops = asdict(PAPER_CROPS) | config["crops"]
        return cls._validated(
            backbone=parse_backbone(config["backbone"]),
            image_size=crops["global_size"],
            mean=crops["mean"],
            std=crops["std"],
            resize=crops["eval_resize"],
            size=crops["eval_size"],
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `plain`. Raises one of `UNSOUND` for what is none."""
        options = dict(values)
        backbone = parse_backbone(options.pop("backbone"), schema=options.pop("schema", None))
        return cls._validated(**options, backbone=backbone)

    @classmethod
    def _validated(cls, **values: Any) -> Self:
        """Refuse what is no preparation of images; whether the architecture can be built, building will show."""
        described = cls(**values)
        for side in (described.image_size, described.resize, described.size):
            if type(side) is not int or side < 1:
                raise ValueError(f"{side!r} is no side of an image")
        if large := _too_large(described.to_dict()):
            raise ValueError(f"{large} is larger than anything in a network")
        for value in (*described.mean, *described.std):
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"{value!r} normalizes no channel")
        if not 0 < len(described.mean) == len(described.std) or min(described.std) <= 0:
            raise ValueError(f"mean {described.mean} and std {described.std} normalize no image")
        return described

    def to_dict(self) -> dict[str, Any]:
        """The same in plain types."""
        schema = next((name for name, known in SCHEMAS["backbone"].items() if known is type(self.backbone)), None)
        return {**asdict(self), "schema": schema}

    def build(self, drop_path_rate: float = 0.0) -> nn.Module:
        """The network with fresh weights, all of them trainable."""
        config = replace(self.backbone, drop_path_rate=drop_path_rate)
        if isinstance(config, TimmConfig):
            arguments = {name: value for name, value in config.arguments.items() if name not in WEIGHT_ARGUMENTS}
            config = replace(config, pretrained=False, arguments=arguments)
        try:
            return build_backbone(config, image_size=self.image_size, channels=len(self.mean), drop_path=True)
        except UserError as error:
            if not drop_path_rate:
                raise
            raise UserError(
                f"eval.drop_path_rate={drop_path_rate}: {self} has no stochastic depth; set eval.drop_path_rate=0."
            ) from error

    def __str__(self) -> str:
        match self.backbone:
            case ViTConfig() as vit:
                registers = f", {vit.registers} registers" if vit.registers else ""
                return (
                    f"ViT of width {vit.width}, depth {vit.depth}, {vit.heads} heads, patches of "
                    f"{vit.patch_size} pixels{registers}, trained at {self.image_size}"
                )
            case TimmConfig() as network:
                return f"timm's {network.name}"
            case other:
                return type(other).__name__


def _too_large(plain: Any) -> int | None:
    """The first whole number above `LARGEST` in plain types."""
    if isinstance(plain, dict | list | tuple):
        parts = plain.values() if isinstance(plain, dict) else plain
        return next(filter(None, map(_too_large, parts)), None)
    return plain if isinstance(plain, int) and abs(plain) > LARGEST else None


def parse_backbone(values: dict[str, Any], *, schema: str | None = None) -> BackboneConfig:
    """The section `backbone` of a configuration. Without the name of its schema, the keys decide."""
    if schema is not None:
        if schema not in SCHEMAS["backbone"]:
            raise UserError(
                f"backbone={schema}: the checkpoint has a backbone that is not part of this package; add "
                "imports=FILE with the file that registers it."
            )
        return cast(BackboneConfig, SCHEMAS["backbone"][schema](**values))
    for known in SCHEMAS["backbone"].values():
        if values.keys() <= {key.name for key in fields(known)}:
            return known(**values)
    raise KeyError(f"no network has the keys {', '.join(values)}")


def build_seeded(build: Any, *, seed: int) -> nn.Module:
    """A frozen network in eval mode, its weights drawn by seed; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        # The CPU's generator alone: `torch.manual_seed` would seed the accelerators, too.
        torch.default_generator.manual_seed(seed)
        backbone: nn.Module = build(drop_path_rate=0.0)
    return backbone.eval().requires_grad_(False)
