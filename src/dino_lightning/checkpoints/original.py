"""State dicts of facebookresearch/dino and of what has the same names: which network they belong to.

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
from torch import Tensor

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
"""Whether blocks have a bottleneck, and how many there are in each stage -> timm's name, which is torchvision's."""

XCITS = {128: "nano", 192: "tiny", 384: "small", 512: "medium", 768: "large"}
"""Width -> size in the name."""


def backbone_weights(content: dict[str, Any], *, key: str, source: str) -> Weights:
    """The weights of the backbone in a file, by the names of its state dict; `source` names the file in errors."""
    networks = [name for name in KEYS if isinstance(content.get(name), dict)]
    if networks and key not in networks:
        raise UserError(f"checkpoint_key={key}: {source} holds {' and '.join(networks)} only.")
    if not networks and key != "teacher":
        raise UserError(f"checkpoint_key={key}: {source} holds one network; leave checkpoint_key=teacher.")
    nested = [content[name] for name in ("state_dict", "model") if isinstance(content.get(name), dict)]
    weights = only_tensors(content[key] if networks else [*nested, content][0])
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in weights.items()}
    inside = strip_prefix(weights, "backbone.")
    # A classifier or DINO head on top is no part of the features.
    weights = {name: tensor for name, tensor in (inside or weights).items() if not name.startswith(("head.", "fc."))}
    if not weights:
        raise UserError(f"{source} holds no weights; expected a state dict of tensors, or one under 'teacher'.")
    return weights


def only_tensors(values: dict[str, Any]) -> Weights:
    """The entries that are tensors, by name."""
    return {name: value for name, value in values.items() if isinstance(name, str) and isinstance(value, Tensor)}


def strip_prefix(weights: Weights, prefix: str) -> Weights:
    """The weights whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def without_mask_token(weights: Weights) -> Weights:
    """The weights that evaluation knows: what stands for masked patches in training is none of them."""
    return {name: tensor for name, tensor in weights.items() if name != "mask_token"}


def num_heads_in_args(content: dict[str, Any]) -> int | None:
    """Attention heads that the arguments of the script name; those of the original do not, its forks' may."""
    arguments = content.get("args")
    found = getattr(arguments, "num_heads", None) if isinstance(arguments, argparse.Namespace) else None
    return found if isinstance(found, int) else None


def identify_network(
    weights: Weights, *, source: str, heads: int | None = None, **seen: Any
) -> tuple[Weights, Description]:
    """The network that these names and shapes belong to, and the weights under its own names.

    `seen` is what is known of the images: `mean`, `std`, `resize`, `size`; by default they are the paper's.
    """
    if "pos_embed" in weights and "patch_embed.proj.weight" in weights and "blocks.0.norm1.weight" in weights:
        description, first = _vit(weights, heads=heads, source=source, **seen), "patch_embed.proj.weight"
    elif "cls_attn_blocks.0.norm1.weight" in weights:
        description, first = _xcit(weights, source=source, **seen), "patch_embed.proj.0.0.weight"
        with torch.device("meta"):
            network = description.build()
        weights = checkpoint_filter_fn(dict(weights), network)
    elif "layer1.0.conv1.weight" in weights:
        description, first = _resnet(weights, source=source, **seen), "conv1.weight"
    else:
        raise UserError(
            f"{source} belongs to no network that is known by its names (ViT, ResNet, XCiT): the first "
            f"are {shorten(weights)}. Networks of timm load by checkpoint=timm:NAME."
        )
    channels = weights[first].shape[1] if first in weights else 3
    if channels != len(description.mean):
        raise UserError(
            f"{source} takes images of {channels} channels, and nothing says how they were normalized; "
            "keep config.yaml of the run beside it."
        )
    return weights, description


def to_original(weights: Weights, description: Description, *, source: str) -> Weights:
    """The weights of a network of ours under the names of the original's files; the inverse of `recognized`.

    Raises `UserError` where the original has no such network, or its files do not tell which one it is.
    """
    match description.backbone:
        case ViTConfig(registers=0) as vit:
            if vit.heads * 64 != vit.width:
                raise UserError(
                    f"{source}: the original's files do not tell the number of heads, which is width / 64 "
                    f"there, and this network has {vit.heads} for a width of {vit.width}"
                )
            return dict(weights)
        case TimmConfig(name=name) if name in RESNETS.values():
            return dict(weights)
        case TimmConfig(name=name) if re.fullmatch(rf"xcit_({'|'.join(XCITS.values())})_\d+_p\d+_\d+", name):
            return _xcit_to_original(weights)
        case _:
            raise UserError(f"{source}: the original has no network like {description}")


def _xcit_to_original(weights: Weights) -> Weights:
    theirs: Weights = {}
    for name, tensor in weights.items():
        attention = re.fullmatch(r"(cls_attn_blocks\.\d+\.attn)\.([qkv])\.(\w+)", name)
        if attention is None:
            theirs[name.replace("pos_embed.", "pos_embeder.")] = tensor
        elif attention[2] == "q":
            parts = [weights[f"{attention[1]}.{part}.{attention[3]}"] for part in "qkv"]
            theirs[f"{attention[1]}.qkv.{attention[3]}"] = torch.cat(parts)
    return theirs


def _vit(weights: Weights, *, heads: int | None, source: str, **seen: Any) -> Description:
    width, patch = len(weights["patch_embed.proj.weight"]), weights["patch_embed.proj.weight"].shape[-1]
    if heads is None and width % 64:
        raise UserError(
            f"{source}: a ViT of width {width} does not tell its number of heads; the original's have 64 "
            "features each. Keep config.yaml of the run beside it."
        )
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    side = math.isqrt(weights["pos_embed"].shape[1] - (0 if registers else 1))  # with registers for patches alone
    depth, heads = _num_modules(weights, "blocks"), heads or width // 64
    config = ViTConfig(width=width, depth=depth, heads=heads, patch_size=patch, registers=registers)
    return Description(config, image_size=side * patch, **seen)


def _resnet(weights: Weights, *, source: str, **seen: Any) -> Description:
    stages = tuple(_num_modules(weights, f"layer{stage}") for stage in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in weights
    name = RESNETS.get((bottleneck, stages))
    if name is None:
        kind = "bottleneck" if bottleneck else "basic"
        raise UserError(
            f"{source}: a ResNet of {stages} {kind} blocks is not known; choose one of {', '.join(RESNETS.values())}."
        )
    # Torchvision's branches do not start at zero, as timm's do: it matters for fresh weights.
    return Description(TimmConfig(name=name, arguments={"zero_init_last": False}), **seen)


def _xcit(weights: Weights, *, source: str, **seen: Any) -> Description:
    width, depth = weights["cls_token"].shape[-1], _num_modules(weights, "blocks")
    patch = 16 if any(name.startswith("patch_embed.proj.6.") for name in weights) else 8
    name = f"xcit_{XCITS.get(width)}_{depth}_p{patch}_224"
    if not timm.is_model(name):
        raise UserError(
            f"{source}: timm has no XCiT of width {width} and depth {depth}; known are widths "
            f"{', '.join(map(str, XCITS))} and depths 12 and 24."
        )
    return Description(TimmConfig(name=name), **seen)


def _num_modules(weights: Weights, name: str) -> int:
    """How many modules there are in a numbered list; of one with gaps, those that are there."""
    pattern = re.compile(rf"{name}\.(\d+)\.")
    return len({found[1] for found in map(pattern.match, weights) if found})


def shorten(names: Iterable[str]) -> str:
    """The first few of many names, each in one line and not too long: they come from files."""
    listed = [" ".join(name.split())[:200] for name in names]
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def load_strictly(network: torch.nn.Module, weights: Weights, *, source: str, taken_for: object) -> None:
    """Load weights of which none may be missing, left over or of another shape."""
    check_names_and_shapes(network.state_dict(), weights, source=source, taken_for=taken_for)
    network.load_state_dict(weights, strict=False)


def check_names_and_shapes(expected: Weights, weights: Weights, *, source: str, taken_for: object) -> None:
    """Refuse weights of which one is missing, left over or of another shape than `expected`."""
    # The counters of batch norms, which older files lack, are not used in evaluation.
    missing = [name for name in expected if name not in weights and not name.endswith("num_batches_tracked")]
    unknown = [str(name) for name in weights if name not in expected]
    shapes = [
        f"{name} of shape {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    lists = {"missing": missing, "unexpected": unknown, "other": shapes}
    wrong = [f"{what} {shorten(names)}" for what, names in lists.items() if names]
    if wrong:
        raise UserError(f"{source} does not fit the architecture it was taken for, {taken_for}: {'; '.join(wrong)}.")
