"""Converts weights of Hugging Face transformers (ViTModel, ResNetModel) to our parameter names and back.

Reads their files without transformers: `config.json`, the weights next to it, and the image preprocessing in
`preprocessor_config.json`.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from dino_lightning.checkpoints.description import Description
from dino_lightning.checkpoints.original import RESNETS, Weights, identify_network, num_heads, num_modules, only_tensors
from dino_lightning.checkpoints.safe_read import read_pickle, read_safetensors
from dino_lightning.config import ViTConfig
from dino_lightning.errors import UserError

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of the weight file in a folder or repository, in order of preference."""
REQUIRED_CONFIG: dict[str, dict[str, tuple[Any, ...]]] = {
    "vit": {"hidden_act": ("gelu",), "qkv_bias": (True,)},
    "resnet": {"hidden_act": ("relu",), "downsample_in_first_stage": (False,), "downsample_in_bottleneck": (False,)},
}
"""Model type -> required values of settings that weight shapes do not show. A missing key has the first value."""
LAYER_NORM_EPSILON = 1e-6
"""Epsilon of our layer norms. DINO's configurations on the Hub say 1e-12, but the original was trained with 1e-6."""

VIT_LAYERS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
BLOCK_LAYERS = {
    "attn.qkv": "attention.attention.query attention.attention.key attention.attention.value",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
}
"""Our layers outside and inside the blocks of a ViT -> those of transformers, which has three for `attn.qkv`."""
STEM_LAYERS = {"conv1": "embedder.embedder.convolution", "bn1": "embedder.embedder.normalization"}
RESNET_LAYERS = {
    "downsample.0": "shortcut.convolution",
    "downsample.1": "shortcut.normalization",
    **{f"conv{i + 1}": f"layer.{i}.convolution" for i in range(3)},
    **{f"bn{i + 1}": f"layer.{i}.normalization" for i in range(3)},
}
"""torchvision's and timm's layers outside and inside the blocks of a ResNet -> those of transformers."""
KINDS = ("", ".weight", ".bias", ".running_mean", ".running_var", ".num_batches_tracked")
"""Ends of a weight's name after that of its layer."""
UNUSED_PREFIXES = ("pooler.", "classifier.", "embeddings.mask_token", "decoder.")
"""Weights that the features do not depend on."""


def is_model_folder(folder: Path) -> bool:
    """Whether transformers wrote this folder."""
    return (folder / CONFIG).is_file() and "model_type" in _read_json(folder / CONFIG)


def refuse_timm(path: Path, *, source: str) -> None:
    """Raise `UserError` for weights next to a `config.json` of timm, which only timm reads."""
    if path.name in WEIGHTS and (path.parent / CONFIG).is_file():
        name = _read_json(path.parent / CONFIG).get("architecture", "NAME")
        raise UserError(f"{source} was written by timm; load it with checkpoint=timm:{name}.")


def read_folder(path: Path, *, source: str) -> tuple[Weights, Description]:
    """The network in a weight file next to its `config.json`; `source` names it in errors."""
    config = _read_json(path.parent / CONFIG)
    kind = config.get("model_type")
    _check_config(config, source=source)
    if path.suffix == ".safetensors":
        stored, _ = read_safetensors(path, source=source)
    else:
        stored = only_tensors(read_pickle(path, source=source))
    weights = {re.sub(rf"^{kind}\.", "", name): tensor for name, tensor in stored.items()}
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(UNUSED_PREFIXES)}
    if kind == "resnet":
        names = _resnet_names([num_modules(weights, f"encoder.stages.{stage}.layers") for stage in range(4)])
    else:
        names = _vit_names(num_modules(weights, "encoder.layer"))
    for name, parts in names.items():
        if weights.keys() >= set(parts):  # the check for missing and unexpected weights reports the others
            tensors = [weights.pop(part) for part in parts]
            weights[name] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    heads = config.get("num_attention_heads", 12) if kind == "vit" else None
    return identify_network(weights, heads=heads, source=source, **_read_preprocessing(path.parent / PREPROCESSOR))


def to_transformers(weights: Weights, network: Description, *, source: str) -> tuple[dict[str, Any], Weights]:
    """The keys of transformers' configuration, and our weights under its parameter names.

    Raises `UserError` if transformers has no such network.
    """
    refusal = UserError(f"{source}: transformers has no class for this network ({network})")
    with torch.device("meta"):
        heads = num_heads(network.build())
    try:
        _, description = identify_network(weights, source=source, mean=network.mean, std=network.std, heads=heads)
    except UserError as error:
        raise refusal from error
    if isinstance(description.backbone, ViTConfig):
        vit = description.backbone
        names = _vit_names(vit.depth)
        settings = {
            "hidden_size": vit.width,
            "num_hidden_layers": vit.depth,
            "num_attention_heads": vit.heads,
            "intermediate_size": 4 * vit.width,
            "patch_size": vit.patch_size,
            "image_size": description.image_size,
            "layer_norm_eps": LAYER_NORM_EPSILON,
        }
    else:
        structures = {name: structure for structure, name in RESNETS.items()}
        bottleneck, depths = structures.get(getattr(description.backbone, "name", ""), (False, ()))
        names = _resnet_names(depths)
        settings = {
            "layer_type": "bottleneck" if bottleneck else "basic",
            "depths": list(depths),
            "hidden_sizes": [64 * 2**stage * (4 if bottleneck else 1) for stage in range(4)],
            "embedding_size": 64,
        }
    if not weights.keys() <= names.keys():
        raise refusal
    renamed = {}
    for name, tensor in weights.items():
        parts = names[name]
        tensors = [part.contiguous() for part in tensor.chunk(len(parts))] if len(parts) > 1 else [tensor]
        renamed |= dict(zip(parts, tensors, strict=True))
    return settings, renamed


def _vit_names(depth: int) -> dict[str, list[str]]:
    """Our names of weights of a ViT -> those of their parts in transformers, in order."""
    layers = dict(VIT_LAYERS)
    for block in range(depth):
        for ours, theirs in BLOCK_LAYERS.items():
            layers[f"blocks.{block}.{ours}"] = " ".join(f"encoder.layer.{block}.{part}" for part in theirs.split())
    return _weight_names(layers)


def _resnet_names(depths: Iterable[int]) -> dict[str, list[str]]:
    """The same for a ResNet with these numbers of blocks in its stages."""
    layers = dict(STEM_LAYERS)
    for stage, blocks in enumerate(depths):
        for block in range(blocks):
            for ours, theirs in RESNET_LAYERS.items():
                layers[f"layer{stage + 1}.{block}.{ours}"] = f"encoder.stages.{stage}.layers.{block}.{theirs}"
    return _weight_names(layers)


def _weight_names(layers: dict[str, str]) -> dict[str, list[str]]:
    return {ours + kind: [part + kind for part in theirs.split()] for ours, theirs in layers.items() for kind in KINDS}


# ----------------------------------------------------------------------------------------------------------- reading


def _check_config(config: dict[str, Any], *, source: str) -> None:
    """Raise `UserError` for networks that compute something else with weights of the same shapes."""
    kind = config.get("model_type")
    if kind not in REQUIRED_CONFIG:
        raise UserError(
            f"{source} is a transformers network of type '{kind}'; expected one of {', '.join(REQUIRED_CONFIG)}. timm "
            "may have it: checkpoint=timm:NAME."
        )
    for key, supported in REQUIRED_CONFIG[kind].items():
        value = config.get(key, supported[0])
        if value not in supported:
            raise UserError(
                f"{source}: {key}={value} in its {CONFIG} is not supported; expected "
                f"{' or '.join(map(str, supported))}."
            )
    epsilon = config.get("layer_norm_eps", 1e-12)
    if kind == "vit" and not (isinstance(epsilon, float) and 0 < epsilon <= LAYER_NORM_EPSILON):
        raise UserError(
            f"{source}: layer_norm_eps={epsilon} in its {CONFIG} is not supported; expected at most "
            f"{LAYER_NORM_EPSILON}."
        )


def _read_preprocessing(path: Path) -> dict[str, Any]:
    """`mean`, `std`, `resize` and `size` of the image processor; empty, which means the paper's, without one."""
    if not path.is_file():
        return {}
    values = _read_json(path)
    preprocessing: dict[str, Any] = {}
    if values.get("do_normalize") is False:
        preprocessing = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    elif {"image_mean", "image_std"} <= values.keys():
        preprocessing = {"mean": values["image_mean"], "std": values["image_std"]}
    sides = list(_sides(values.get("crop_size") if values.get("do_center_crop") else None))
    resize = list(_sides(values.get("size")))
    if sides and resize:
        return preprocessing | {"resize": resize[0], "size": sides[0]}
    # Without a crop, transformers resizes the whole image to a square; we crop the same share as in the paper.
    return preprocessing | ({"resize": round(resize[0] * 8 / 7), "size": resize[0]} if resize else {})


def _sides(size: Any) -> Iterator[int]:
    """The sides of a size in their configuration: a number, or a dictionary of numbers."""
    yield from [size] if isinstance(size, int) else (size or {}).values()


def _read_json(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text())
    if not isinstance(values, dict):
        raise UserError(f"{path} does not contain the settings of a network.")
    return values
