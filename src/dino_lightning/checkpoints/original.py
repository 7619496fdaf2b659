"""Identifies the network of a state dict with the parameter names of facebookresearch/dino.

A published backbone is a state dict. A full checkpoint holds `student` and `teacher`, whose names start with
`backbone.` or `head.` (the student's behind `module.`), the optimizer, and the script's `args`.
"""

import argparse
import math
import re
from collections.abc import Iterable
from typing import Any

import timm
import torch
from timm.models.xcit import checkpoint_filter_fn
from torch import Tensor, nn

from dino_lightning.checkpoints.description import Description
from dino_lightning.config import TimmConfig, ViTConfig
from dino_lightning.errors import UserError

Weights = dict[str, Tensor]

KEYS = ("teacher", "student")

RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
"""(whether blocks have a bottleneck, number of blocks in each stage) -> name in timm and torchvision."""

XCITS = {128: "nano", 192: "tiny", 384: "small", 512: "medium", 768: "large"}
"""Width -> size in timm's name."""


def backbone_weights(content: dict[str, Any], *, key: str, source: str) -> Weights:
    """The state dict of the backbone in a file's content; `source` names the file in errors."""
    networks = [name for name in KEYS if isinstance(content.get(name), dict)]
    if networks and key not in networks:
        raise UserError(f"checkpoint_key={key}: {source} contains only {' and '.join(networks)}.")
    if not networks and key != "teacher":
        raise UserError(f"checkpoint_key={key}: {source} contains only one network; leave checkpoint_key=teacher.")
    nested = [content[name] for name in ("state_dict", "model") if isinstance(content.get(name), dict)]
    weights = only_tensors(content[key] if networks else [*nested, content][0])
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in weights.items()}
    weights = strip_prefix(weights, "backbone.") or weights
    # A classifier or DINO head is not part of the features.
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(("head.", "fc."))}
    if not weights:
        raise UserError(
            f"{source} contains no weights; expected a state dict of tensors, or one under the key 'teacher'."
        )
    return weights


def only_tensors(values: dict[str, Any]) -> Weights:
    """The entries that are tensors, by name."""
    return {name: value for name, value in values.items() if isinstance(name, str) and isinstance(value, Tensor)}


def strip_prefix(weights: Weights, prefix: str) -> Weights:
    """The weights whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def without_mask_token(weights: Weights) -> Weights:
    """The weights without the token that replaces masked patches in training; evaluation does not use it."""
    return {name: tensor for name, tensor in weights.items() if name != "mask_token"}


def num_heads_in_args(content: dict[str, Any]) -> int | None:
    """Number of attention heads in the stored script arguments; the original does not store it, some forks do."""
    arguments = content.get("args")
    heads = getattr(arguments, "num_heads", None) if isinstance(arguments, argparse.Namespace) else None
    return heads if isinstance(heads, int) else None


def num_heads(backbone: nn.Module) -> int | None:
    """Number of attention heads of a network, which the shapes of its weights do not show; None without attention."""
    blocks = getattr(backbone, "blocks", None) or [None]
    return getattr(getattr(blocks[0], "attn", None), "num_heads", None)


def identify_network(
    weights: Weights, *, source: str, heads: int | None = None, **preprocessing: Any
) -> tuple[Weights, Description]:
    """Detect the network from names and shapes of its weights; returns the weights under its own parameter names.

    `preprocessing` may give `mean`, `std`, `resize` and `size`; the defaults are the paper's.
    """
    if "pos_embed" in weights and "patch_embed.proj.weight" in weights and "blocks.0.norm1.weight" in weights:
        description, first = _vit(weights, heads=heads, source=source, **preprocessing), "patch_embed.proj.weight"
    elif "cls_attn_blocks.0.norm1.weight" in weights:
        description, first = _xcit(weights, source=source, **preprocessing), "patch_embed.proj.0.0.weight"
        with torch.device("meta"):
            network = description.build()
        weights = checkpoint_filter_fn(dict(weights), network)
    elif "layer1.0.conv1.weight" in weights:
        description, first = _resnet(weights, source=source, **preprocessing), "conv1.weight"
    else:
        raise UserError(
            f"{source} has weight names of no known network (ViT, ResNet, XCiT), for example {shorten(weights)}. Use "
            "checkpoint=timm:NAME for timm networks."
        )
    channels = weights[first].shape[1] if first in weights else 3
    if channels != len(description.mean):
        raise UserError(
            f"{source} expects images with {channels} channels, but does not specify their normalization; export the "
            "weights with dino-lightning, which stores it."
        )
    return weights, description


def to_original(weights: Weights, description: Description, *, source: str) -> Weights:
    """The weights under the parameter names of the original; the inverse of `identify_network`.

    Raises `UserError` if the original has no such network, or its files could not identify it.
    """
    match description.backbone:
        case ViTConfig(registers=0) as vit:
            if vit.heads * 64 != vit.width:
                raise UserError(
                    f"{source}: the original always uses width / 64 heads, but this network has {vit.heads} heads and "
                    f"width {vit.width}"
                )
            return dict(weights)
        case TimmConfig(name=name) if name in RESNETS.values():
            return dict(weights)
        case TimmConfig(name=name) if re.fullmatch(rf"xcit_({'|'.join(XCITS.values())})_\d+_p\d+_\d+", name):
            return _xcit_to_original(weights)
        case _:
            raise UserError(f"{source}: the original has no such network ({description})")


def _xcit_to_original(weights: Weights) -> Weights:
    original: Weights = {}
    for name, tensor in weights.items():
        attention = re.fullmatch(r"(cls_attn_blocks\.\d+\.attn)\.([qkv])\.(\w+)", name)
        if attention is None:
            original[name.replace("pos_embed.", "pos_embeder.")] = tensor
        elif attention[2] == "q":
            parts = [weights[f"{attention[1]}.{part}.{attention[3]}"] for part in "qkv"]
            original[f"{attention[1]}.qkv.{attention[3]}"] = torch.cat(parts)
    return original


def _vit(weights: Weights, *, heads: int | None, source: str, **preprocessing: Any) -> Description:
    width, patch = len(weights["patch_embed.proj.weight"]), weights["patch_embed.proj.weight"].shape[-1]
    if heads is None and width % 64:
        raise UserError(
            f"{source}: the number of heads of a ViT with width {width} is unknown; the original's ViTs have 64 "
            "features per head. Export the weights with dino-lightning, which stores the number."
        )
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    side = math.isqrt(
        weights["pos_embed"].shape[1] - (0 if registers else 1)
    )  # with registers, only patches have positions
    depth, heads = num_modules(weights, "blocks"), heads or width // 64
    config = ViTConfig(width=width, depth=depth, heads=heads, patch_size=patch, registers=registers)
    return Description(config, image_size=side * patch, **preprocessing)


def _resnet(weights: Weights, *, source: str, **preprocessing: Any) -> Description:
    stages = tuple(num_modules(weights, f"layer{stage}") for stage in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in weights
    name = RESNETS.get((bottleneck, stages))
    if name is None:
        kind = "bottleneck" if bottleneck else "basic"
        raise UserError(
            f"{source}: a ResNet with {stages} {kind} blocks is not supported; expected one of "
            f"{', '.join(RESNETS.values())}."
        )
    # Unlike timm, torchvision does not initialize residual branches with zero; this matters for untrained networks.
    return Description(TimmConfig(name=name, arguments={"zero_init_last": False}), **preprocessing)


def _xcit(weights: Weights, *, source: str, **preprocessing: Any) -> Description:
    width, depth = weights["cls_token"].shape[-1], num_modules(weights, "blocks")
    patch = 16 if any(name.startswith("patch_embed.proj.6.") for name in weights) else 8
    name = f"xcit_{XCITS.get(width)}_{depth}_p{patch}_224"
    if not timm.is_model(name):
        raise UserError(
            f"{source}: timm has no XCiT with width {width} and depth {depth}; expected widths "
            f"{', '.join(map(str, XCITS))} and depths 12 and 24."
        )
    return Description(TimmConfig(name=name), **preprocessing)


def num_modules(weights: Weights, name: str) -> int:
    """Number of modules in a numbered list that have weights."""
    pattern = re.compile(rf"{name}\.(\d+)\.")
    return len({match[1] for match in map(pattern.match, weights) if match})


def shorten(names: Iterable[str]) -> str:
    """The first three names, each cut to one line of 200 characters, and the number of the others."""
    listed = [" ".join(name.split())[:200] for name in names]
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def check_names_and_shapes(expected: Weights, weights: Weights, *, source: str, target: str) -> None:
    """Raise `UserError` for missing or unexpected weights, or other shapes than those of `target`."""
    # Evaluation does not use the counters of batch norms, which some files lack.
    missing = [name for name in expected if name not in weights and not name.endswith("num_batches_tracked")]
    unknown = [str(name) for name in weights if name not in expected]
    shapes = [
        f"{name} has shape {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    problems = {"missing ": missing, "unexpected ": unknown, "": shapes}
    if problem := "; ".join(f"{kind}{shorten(names)}" for kind, names in problems.items() if names):
        raise UserError(f"{source} does not fit {target}: {problem}.")
