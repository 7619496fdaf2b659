"""Networks of Hugging Face's transformers under the names of ours, and ours under theirs: ViTModel and ResNetModel.

Their files are read here without transformers: `config.json`, the weights beside it, and `preprocessor_config.json`,
which says how images are prepared.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dino_lightning.checkpoints.description import Description
from dino_lightning.checkpoints.original import RESNETS, Weights, identify_network
from dino_lightning.checkpoints.safe_read import read_pickle, read_safetensors
from dino_lightning.config import ViTConfig
from dino_lightning.errors import UserError

CONFIG, PREPARATION = "config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of the weights in a folder or repository, the better one first."""
REQUIRED_CONFIG: dict[str, dict[str, tuple[Any, ...]]] = {
    "vit": {"hidden_act": ("gelu",), "qkv_bias": (True,)},
    "resnet": {
        "hidden_act": ("relu",),
        "downsample_in_first_stage": (False,),
        "downsample_in_bottleneck": (False,),
    },
}
"""Kind of network -> what shapes of weights do not tell and ours has; a key that is missing has the first value."""
LAYER_NORM_EPSILON = 1e-6
"""That of our layer norms. Their configurations of DINO say 1e-12, with which the original was not trained."""

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
"""Theirs -> ours, of a ViT outside of its blocks and inside of them."""
QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
"""What is one layer in ours."""
UNUSED_PREFIXES = ("pooler.", "classifier.", "embeddings.mask_token", "decoder.")
"""Beginnings of names that are no part of the features."""


def is_model_folder(folder: Path) -> bool:
    """Whether transformers has written this folder."""
    return (folder / CONFIG).is_file() and "model_type" in _read_json(folder / CONFIG)


def refuse_timm(path: Path, *, source: str) -> None:
    """Refuse weights beside a `config.json` of timm: it names the network and its images, and only timm reads it."""
    if path.name in WEIGHTS and (path.parent / CONFIG).is_file():
        name = _read_json(path.parent / CONFIG).get("architecture", "NAME")
        raise UserError(f"{source} holds weights as timm keeps them; timm loads its own by checkpoint=timm:{name}.")


def read_folder(path: Path, *, source: str) -> tuple[Weights, Description]:
    """The network in a file of weights beside its `config.json`; `source` names it in errors."""
    config = _read_json(path.parent / CONFIG)
    kind = config.get("model_type")
    _check_config(config, source=source)
    given = read_safetensors(path, source=source)[0] if path.suffix == ".safetensors" else _read_bin(path, source)
    weights = {re.sub(rf"^{kind}\.", "", name): tensor for name, tensor in given.items()}
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(UNUSED_PREFIXES)}
    seen = _read_preprocessing(path.parent / PREPARATION)
    if kind == "resnet":
        return identify_network(_resnet_from_transformers(weights), source=source, **seen)
    return identify_network(
        _vit_from_transformers(weights), heads=config.get("num_attention_heads", 12), source=source, **seen
    )


def to_transformers(weights: Weights, known: Description, *, source: str) -> tuple[dict[str, Any], Weights]:
    """The keys of their configuration, and weights of ours under their names.

    Raises `UserError` where they have no such network; `known` is what we know of it.
    """
    refusal = UserError(f"{source}: transformers has no class for {known}")
    try:
        _, description = identify_network(
            weights, source=source, mean=known.mean, std=known.std, heads=_num_heads(known)
        )
    except UserError as error:
        raise refusal from error
    if not isinstance(description.backbone, ViTConfig):
        return _resnet_to_transformers(weights, description, refusal)
    vit, theirs = description.backbone, {}
    for name, tensor in weights.items():
        others = _vit_names(name)
        if others is None or vit.registers:
            raise refusal
        theirs |= {other: part.contiguous() for other, part in zip(others, tensor.chunk(len(others)), strict=True)}
    return {
        "hidden_size": vit.width,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.heads,
        "intermediate_size": 4 * vit.width,
        "patch_size": vit.patch_size,
        "image_size": description.image_size,
        "layer_norm_eps": LAYER_NORM_EPSILON,
    }, theirs


def _vit_from_transformers(weights: Weights) -> Weights:
    """Names that are not known stay, and will be refused with those that are missing."""
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
    """Their names for one of our weights, of which it has the parts in this order; None for what they do not have."""
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


def _num_heads(known: Description) -> int | None:
    """Heads of attention, where the network is a ViT or timm says them."""
    if isinstance(known.backbone, ViTConfig):
        return known.backbone.heads
    with torch.device("meta"):
        blocks: Any = getattr(known.build(), "blocks", None)
    return getattr(getattr(blocks[0], "attn", None), "num_heads", None) if blocks else None


STEM = {"embedder.embedder.convolution": "conv1", "embedder.embedder.normalization": "bn1"}
SHORTCUT = {"convolution": "downsample.0", "normalization": "downsample.1"}
LAYER = {"convolution": "conv", "normalization": "bn"}
"""Theirs -> torchvision's, of a ResNet."""


def _resnet_from_transformers(weights: Weights) -> Weights:
    ours = {}
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"encoder\.stages\.(\d)\.layers\.(\d+)\.(?:(shortcut)|layer\.(\d))\.(\w+)", stem)
        if block is not None:
            place = SHORTCUT[block[5]] if block[3] else f"{LAYER[block[5]]}{int(block[4]) + 1}"
            stem = f"layer{int(block[1]) + 1}.{block[2]}.{place}"
        ours[f"{STEM.get(stem, stem)}.{kind}"] = tensor
    return ours


def _resnet_to_transformers(
    weights: Weights, description: Description, refusal: UserError
) -> tuple[dict[str, Any], Weights]:
    known = {name: kind for kind, name in RESNETS.items()}
    name = getattr(description.backbone, "name", "")
    if name not in known:
        raise refusal
    bottleneck, depths = known[name]
    places = {f"{ours}{i}": f"layer.{i - 1}.{theirs}" for theirs, ours in LAYER.items() for i in (1, 2, 3)}
    places |= {ours: f"shortcut.{theirs}" for theirs, ours in SHORTCUT.items()}
    outside = {ours: theirs for theirs, ours in STEM.items()}
    theirs = {}
    for own, tensor in weights.items():
        stem, _, kind = own.rpartition(".")
        if block := re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", stem):
            if block[3] not in places:
                raise refusal
            stem = f"encoder.stages.{int(block[1]) - 1}.layers.{block[2]}.{places[block[3]]}"
        theirs[f"{outside.get(stem, stem)}.{kind}"] = tensor
    widths = [64 * 2**stage * (4 if bottleneck else 1) for stage in range(4)]
    return {
        "layer_type": "bottleneck" if bottleneck else "basic",
        "depths": list(depths),
        "hidden_sizes": widths,
        "embedding_size": 64,
    }, theirs


# ----------------------------------------------------------------------------------------------------------- reading


def _check_config(config: dict[str, Any], *, source: str) -> None:
    """Refuse networks that compute something else than ours with weights of the same shapes."""
    kind = config.get("model_type")
    if kind not in REQUIRED_CONFIG:
        raise UserError(
            f"{source} is a network of transformers of the type '{kind}'; expected one of "
            f"{', '.join(REQUIRED_CONFIG)}, and timm may have it: checkpoint=timm:NAME."
        )
    for key, known in REQUIRED_CONFIG[kind].items():
        value = config.get(key, known[0])
        if value not in known:
            raise UserError(
                f"{source}: {key}={value} in its {CONFIG} is not what a network here computes; expected "
                f"{' or '.join(map(str, known))}."
            )
    epsilon = config.get("layer_norm_eps", 1e-12)
    if kind == "vit" and not (isinstance(epsilon, float) and 0 < epsilon <= LAYER_NORM_EPSILON):
        raise UserError(
            f"{source}: layer_norm_eps={epsilon} in its {CONFIG} is not what a network here computes; "
            f"expected {LAYER_NORM_EPSILON} or less."
        )


def _read_preprocessing(path: Path) -> dict[str, Any]:
    """`mean`, `std`, `resize` and `size` by their image processor; those of the paper where there is none."""
    if not path.is_file():
        return {}
    values = _read_json(path)
    seen: dict[str, Any] = {}
    if values.get("do_normalize") is False:
        seen = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    elif {"image_mean", "image_std"} <= values.keys():
        seen = {"mean": values["image_mean"], "std": values["image_std"]}
    sides = list(_sides(values.get("crop_size") if values.get("do_center_crop") else None))
    resize = list(_sides(values.get("size")))
    if sides and resize:
        return seen | {"resize": resize[0], "size": sides[0]}
    # Without a crop the whole image becomes a square; here the crop takes as much of it as in the paper.
    return seen | ({"resize": round(resize[0] * 8 / 7), "size": resize[0]} if resize else {})


def _sides(size: Any) -> Iterator[int]:
    """The sides that a size of theirs names: a number, or a table of numbers."""
    yield from [size] if isinstance(size, int) else (size or {}).values()


def _read_json(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text())
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings of a network.")
    return values


def _read_bin(path: Path, source: str) -> Weights:
    content = read_pickle(path, source=source)
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
