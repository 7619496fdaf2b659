"""Exports the teacher's backbone as a safetensors file that `timm.create_model` loads."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor

from dino_lightning.checkpoints.description import Description
from dino_lightning.checkpoints.original import without_mask_token
from dino_lightning.models.backbones import timm_recipes
from dino_lightning.runtime.files import atomic_file


def export_backbone(weights: dict[str, Tensor], path: str | Path, description: Description) -> dict[str, Any]:
    """Write a backbone's weights to `path` and return the arguments of `timm.create_model` that fit them.

    A user's own backbone has no such arguments; the result is then empty.

    The file's metadata contains these arguments as JSON (`timm`), the normalization of the images, their sizes in
    evaluation (`eval`) and the description that `load_network` needs (`network`), so that the file is self-contained.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in without_mask_token(weights).items()}
    size, channels = description.image_size, len(description.mean)
    recipe = _fitting_recipe(weights, timm_recipes(description.backbone, image_size=size, channels=channels))
    values = {
        **({"timm": recipe} if recipe else {}),
        "mean": description.mean,
        "std": description.std,
        "eval": {"resize": description.resize, "size": description.size},
        "network": description.to_dict(),
    }
    metadata = {"format": "pt", **{key: json.dumps(value) for key, value in values.items()}}
    with atomic_file(Path(path)) as file:
        file.write(save(weights, metadata=metadata))
    return recipe


def _fitting_recipe(weights: dict[str, Tensor], recipes: list[dict[str, Any]]) -> dict[str, Any]:
    if not recipes:  # a user's own backbone
        return {}
    for recipe in recipes:
        try:
            with torch.device("meta"):
                network = timm.create_model(**recipe)
        except TypeError:  # this network does not take one of the arguments
            continue
        expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
        if expected == {name: tensor.shape for name, tensor in weights.items()}:
            return recipe
    raise RuntimeError(f"no arguments of timm.create_model fit the weights: tried {recipes}")
