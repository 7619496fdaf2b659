"""timm networks, with timm's published weights or without."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from dino_lightning.checkpoints.description import PAPER_CROPS, Description
from dino_lightning.checkpoints.original import check_names_and_shapes, identify_network
from dino_lightning.config import TimmConfig
from dino_lightning.errors import UserError, did_you_mean
from dino_lightning.models.backbones import build_backbone


def timm_description(name: str, *, source: str) -> Description:
    """Architecture and preprocessing of a timm network; `source` names it in errors.

    DINO's weights (such as `vit_small_patch16_224.dino`) become an `OriginalViT`, which resamples the position
    embedding as in their training, with images resized to 256 pixels as for the published figures. Other ViTs resample
    like timm.
    """
    settings = _pretrained_cfg(name, source=source)
    channels, size = settings.input_size[0], settings.input_size[-1]
    description = Description(
        TimmConfig(name=name, drop_path_rate=0.0),
        image_size=size,
        mean=per_channel(settings.mean, channels),
        std=per_channel(settings.std, channels),
        resize=math.floor(size / settings.crop_pct),
        size=size,
    )
    if settings.tag != "dino":
        return description
    with torch.device("meta"):
        weights = description.build().state_dict()
    _, original = identify_network(weights, source=source)
    return replace(description, backbone=original.backbone, resize=PAPER_CROPS.eval_resize, size=PAPER_CROPS.eval_size)


def load_pretrained(name: str, description: Description, *, source: str, file: Path | None = None) -> nn.Module:
    """The network with published weights: from `file`, timm's cache, or downloaded."""
    overlay: dict[str, Any] = {"pretrained_cfg_overlay": {"file": str(file)}} if file else {}
    config = TimmConfig(name=name, pretrained=True, drop_path_rate=0.0, arguments=overlay)
    size, channels = description.image_size, len(description.mean)
    try:
        network = build_backbone(config, image_size=size, channels=channels, drop_path=False)
    except UserError:
        raise
    except Exception as error:  # each source of weights raises errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{source}: its weights could not be loaded ({reason}).") from error
    if isinstance(description.backbone, TimmConfig):
        return network
    original = description.build()
    weights = network.state_dict()
    check_names_and_shapes(original.state_dict(), weights, source=source, target=str(description))
    original.load_state_dict(weights, strict=False)
    return original


def per_channel(values: tuple[float, ...] | float, channels: int) -> list[float]:
    """One value for each channel; some timm settings have one value for all channels."""
    listed = [float(value) for value in (values if isinstance(values, tuple | list) else (values,))]
    return listed * channels if len(listed) == 1 else listed


def _pretrained_cfg(name: str, *, source: str) -> Any:
    """timm's settings for these weights. Raises `UserError` for an unknown name or tag."""
    try:
        settings = get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # no such tag
        settings = None
    if settings is None:
        architecture = name.split(".")[0]
        tagged = timm.list_pretrained(f"{architecture}.*") if timm.is_model(architecture) else []
        known = tagged or [*timm.list_models(), *timm.list_pretrained()]
        raise UserError(f"{source}: timm {timm.__version__} has no network '{name}'; {did_you_mean(name, known)}")
    return settings
