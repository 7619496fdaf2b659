"""The description that checkpoints store next to the weights: architecture and image preprocessing."""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self, cast

import torch
from torch import nn

from dino_lightning.config import SCHEMAS, BackboneConfig, CropsConfig, TimmConfig, TrainConfig, ViTConfig
from dino_lightning.config.registry import import_component
from dino_lightning.errors import UserError
from dino_lightning.models.backbones import build_backbone

PAPER_CROPS = CropsConfig()
"""The paper's preprocessing, used for weights that do not specify one."""

MAX_SIZE = 65_536
"""Larger numbers in a description mean a damaged file; building such a network would take hours or all memory."""
WEIGHT_ARGUMENTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
"""timm arguments that load weights. They are ignored, so that a file cannot make us read another file."""


@dataclass(frozen=True)
class Description:
    """A network without its weights; checkpoints store it as plain types (`to_dict`)."""

    backbone: BackboneConfig
    image_size: int = PAPER_CROPS.global_size
    """Image side for which the learned position embedding is made (pixels)."""
    mean: list[float] = field(default_factory=lambda: PAPER_CROPS.mean)
    std: list[float] = field(default_factory=lambda: PAPER_CROPS.std)
    """Normalization of each channel, for values in 0 to 1."""
    resize: int = PAPER_CROPS.eval_resize
    """Shorter side of an evaluation image before the center crop (pixels)."""
    size: int = PAPER_CROPS.eval_size
    """Side of the center crop (pixels)."""

    @classmethod
    def of_run(cls, config: TrainConfig) -> Self:
        """The network that a run trains."""
        crops = config.crops
        return cls(config.backbone, crops.global_size, crops.mean, crops.std, crops.eval_resize, crops.eval_size)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises KeyError, TypeError, AttributeError or ValueError for other values."""
        options = dict(values)
        backbone = _parse_backbone(options.pop("backbone"), schema=options.pop("schema", None))
        description = cls(**options, backbone=backbone)
        description._check()
        return description

    def _check(self) -> None:
        """Check sizes and normalization; building the network checks the architecture."""
        for side in (self.image_size, self.resize, self.size):
            if type(side) is not int or side < 1:
                raise ValueError(f"{side!r} is not an image size")
        sizes = [self.image_size, self.resize, self.size, *asdict(self.backbone).values()]
        if too_large := [size for size in sizes if isinstance(size, int) and size > MAX_SIZE]:
            raise ValueError(f"the size {too_large[0]} is too large")
        mean, std = ([float(value) for value in values] for values in (self.mean, self.std))
        if not 0 < len(mean) == len(std) or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} are not a normalization")

    def to_dict(self) -> dict[str, Any]:
        """The description as plain types, with the name of the backbone's schema."""
        schema = next((name for name, known in SCHEMAS["backbone"].items() if known is type(self.backbone)), None)
        return {**asdict(self), "schema": schema}

    def build(self, drop_path_rate: float = 0.0) -> nn.Module:
        """The network with random weights, all of them trainable."""
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
                    f"ViT, width {vit.width}, depth {vit.depth}, {vit.heads} heads, patch size {vit.patch_size}"
                    f"{registers}, trained at {self.image_size} pixels"
                )
            case TimmConfig() as network:
                return f"timm's {network.name}"
            case other:
                return type(other).__name__


def _parse_backbone(values: dict[str, Any], *, schema: str | None = None) -> BackboneConfig:
    """The backbone config with these values; without the name of its schema, the keys decide."""
    if schema is not None:
        import_component("backbone", schema)
        if schema not in SCHEMAS["backbone"]:
            raise UserError(
                f"its backbone={schema} is not part of this package; add imports=FILE with the file that registers it."
            )
        return cast(BackboneConfig, SCHEMAS["backbone"][schema](**values))
    for known in SCHEMAS["backbone"].values():
        if values.keys() <= {key.name for key in fields(known)}:
            return known(**values)
    raise KeyError(f"no network has the keys {', '.join(values)}")


def build_seeded(build: Any, *, seed: int) -> nn.Module:
    """A frozen network in eval mode with weights drawn by `seed`; the global random state does not change."""
    with torch.random.fork_rng(devices=[]):
        # Seed only the CPU's generator: `torch.manual_seed` would seed the accelerators, too.
        torch.default_generator.manual_seed(seed)
        backbone: nn.Module = build(drop_path_rate=0.0)
    return backbone.eval().requires_grad_(False)
