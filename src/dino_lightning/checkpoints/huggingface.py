"""Converts weights of Hugging Face transformers (ViTModel, ResNetModel) to our parameter names and back.

Reads their files without transformers: `config.json`, the weights next to it, and the image preprocessing in
`preprocessor_config.json`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dino_lightning.checkpoints.description import Description
from dino_lightning.checkpoints.original import RESNETS, Weights, identify_network, only_tensors
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

OUTER_LAYERS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
BLOCK_LAYERS = {
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
"""Parameter names of transformers -> ours, for a ViT outside and inside its blocks."""
QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
"""Three layers that are one layer, `attn.qkv`, in ours."""
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
    is_safetensors = path.suffix == ".safetensors"
    stored = (
        read_safetensors(path, source=source)[0] if is_safetensors else only_tensors(read_pickle(path, source=source))
    )
    weights = {re.sub(rf"^{kind}\.", "", name): tensor for name, tensor in stored.items()}
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(UNUSED_PREFIXES)}
    preprocessing = _read_preprocessing(path.parent / PREPROCESSOR)
    if kind == "resnet":
        return identify_network(_resnet_from_transformers(weights), source=source, **preprocessing)
    return identify_network(
        _vit_from_transformers(weights), heads=config.get("num_attention_heads", 12), source=source, **preprocessing
    )


def to_transformers(weights: Weights, network: Description, *, source: str) -> tuple[dict[str, Any], Weights]:
    """The keys of transformers' configuration, and our weights under its parameter names.

    Raises `UserError` if transformers has no such network.
    """
    refusal = UserError(f"{source}: transformers has no class for this network ({network})")
    try:
        _, description = identify_network(
            weights, source=source, mean=network.mean, std=network.std, heads=_num_heads(network)
        )
    except UserError as error:
        raise refusal from error
    if not isinstance(description.backbone, ViTConfig):
        return _resnet_to_transformers(weights, description, refusal)
    vit, renamed = description.backbone, {}
    for name, tensor in weights.items():
        names = _vit_names(name)
        if names is None or vit.registers:
            raise refusal
        renamed |= {name: part.contiguous() for name, part in zip(names, tensor.chunk(len(names)), strict=True)}
    return {
        "hidden_size": vit.width,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.heads,
        "intermediate_size": 4 * vit.width,
        "patch_size": vit.patch_size,
        "image_size": description.image_size,
        "layer_norm_eps": LAYER_NORM_EPSILON,
    }, renamed


def _vit_from_transformers(weights: Weights) -> Weights:
    """Unknown names stay; the check for missing and unexpected weights reports them."""
    ours = {}
    for name, tensor in weights.items():
        block = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(\w+)", name)
        stem, _, kind = name.rpartition(".")
        if name in OUTER_LAYERS:
            ours[OUTER_LAYERS[name]] = tensor
        elif stem in OUTER_LAYERS:
            ours[f"{OUTER_LAYERS[stem]}.{kind}"] = tensor
        elif block is None:
            ours[name] = tensor
        elif block[2] in BLOCK_LAYERS:
            ours[f"blocks.{block[1]}.{BLOCK_LAYERS[block[2]]}.{block[3]}"] = tensor
        elif block[2] == QKV[0]:
            start = f"encoder.layer.{block[1]}"
            parts = [weights[f"{start}.{part}.{block[3]}"] for part in QKV]
            ours[f"blocks.{block[1]}.attn.qkv.{block[3]}"] = torch.cat(parts)
        elif block[2] not in QKV:
            ours[name] = tensor
    return ours


def _vit_names(name: str) -> list[str] | None:
    """The names in transformers for the parts of one of our weights, in order; None if it has no counterpart."""
    stem, _, kind = name.rpartition(".")
    for theirs, ours in OUTER_LAYERS.items():
        if ours in (name, stem):
            return [theirs if ours == name else f"{theirs}.{kind}"]
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
    if block is None:
        return None
    layers = (
        QKV if block[2] == "attn.qkv" else tuple(theirs for theirs, ours in BLOCK_LAYERS.items() if ours == block[2])
    )
    return [f"encoder.layer.{block[1]}.{layer}.{kind}" for layer in layers] or None


def _num_heads(network: Description) -> int | None:
    """Number of attention heads, for a ViT or a timm network with attention."""
    if isinstance(network.backbone, ViTConfig):
        return network.backbone.heads
    with torch.device("meta"):
        blocks: Any = getattr(network.build(), "blocks", None)
    return getattr(getattr(blocks[0], "attn", None), "num_heads", None) if blocks else None


STEM = {"embedder.embedder.convolution": "conv1", "embedder.embedder.normalization": "bn1"}
SHORTCUT = {"convolution": "downsample.0", "normalization": "downsample.1"}
LAYER = {"convolution": "conv", "normalization": "bn"}
"""Parameter names of transformers -> torchvision's, for a ResNet."""


def _resnet_from_transformers(weights: Weights) -> Weights:
    ours = {}
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"encoder\.stages\.(\d)\.layers\.(\d+)\.(?:(shortcut)|layer\.(\d))\.(\w+)", stem)
        if block is not None:
            layer = SHORTCUT[block[5]] if block[3] else f"{LAYER[block[5]]}{int(block[4]) + 1}"
            stem = f"layer{int(block[1]) + 1}.{block[2]}.{layer}"
        ours[f"{STEM.get(stem, stem)}.{kind}"] = tensor
    return ours


def _resnet_to_transformers(
    weights: Weights, description: Description, refusal: UserError
) -> tuple[dict[str, Any], Weights]:
    structures = {name: structure for structure, name in RESNETS.items()}
    name = getattr(description.backbone, "name", "")
    if name not in structures:
        raise refusal
    bottleneck, depths = structures[name]
    layers = {f"{ours}{i}": f"layer.{i - 1}.{theirs}" for theirs, ours in LAYER.items() for i in (1, 2, 3)}
    layers |= {ours: f"shortcut.{theirs}" for theirs, ours in SHORTCUT.items()}
    outer = {ours: theirs for theirs, ours in STEM.items()}
    renamed = {}
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        if block := re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", stem):
            if block[3] not in layers:
                raise refusal
            stem = f"encoder.stages.{int(block[1]) - 1}.layers.{block[2]}.{layers[block[3]]}"
        renamed[f"{outer.get(stem, stem)}.{kind}"] = tensor
    widths = [64 * 2**stage * (4 if bottleneck else 1) for stage in range(4)]
    return {
        "layer_type": "bottleneck" if bottleneck else "basic",
        "depths": list(depths),
        "hidden_sizes": widths,
        "embedding_size": 64,
    }, renamed


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
