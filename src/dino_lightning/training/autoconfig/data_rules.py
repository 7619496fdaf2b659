"""The rule of `auto.data`: settings from the number and the size of the images, each with its reason.

For ImageNet, a side of 256 pixels or more and a total batch of 1024 it gives the paper's settings, and adapts them to
smaller data and shorter runs; docs/small_data.md says how each line was found. `apply` measures the images.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dino_lightning.config import (
    AdamWConfig,
    BackboneConfig,
    DINOConfig,
    LARSConfig,
    MethodConfig,
    MoCoConfig,
    OptimConfig,
    SGDConfig,
    SwAVConfig,
    TeacherConfig,
    TimmConfig,
    ViTConfig,
)

IMAGES_PER_PROTOTYPE = 5
MIN_PROTOTYPES, MAX_PROTOTYPES = 64, 65536
PAPER_BATCH = 1024
"""Total batch of the paper."""
PAPER_HORIZON_STEPS, SMALL_BATCH_HORIZON_STEPS = 250, 2000
"""Steps that the teacher averages over, 1 / (1 - momentum), at the paper's total batch and at 256 images."""
MAX_HORIZON_SHARE = 0.05
"""Longest horizon of the teacher (share of the run's steps)."""
MIN_HORIZON_STEPS = 50
"""Shortest horizon, whatever its share of the run: teachers that follow faster collapsed."""
TEMPERATURE = 0.04
PAPER_STEPS = 125_000
"""Optimizer steps of 100 epochs of ImageNet."""
WARMUP_STEPS, MIN_WARMUP_PERCENT, MAX_WARMUP_PERCENT = 100, 10, 30
"""The learning rate's warm-up has so many steps, but neither less nor more than these shares of the run."""
PAPER_GLOBAL, PAPER_LOCAL, PAPER_RESIZE = 224, 96, 256
"""Sides of the crops, and of an image for evaluation (pixels)."""
PATCH_SIZES = (16, 8, 4, 2, 1)
MIN_TOKENS = 8
"""Fewest tokens along a side of a global crop."""
MIN_LOCAL_PX = 14
"""Smallest side of the image region that a local crop shows (pixels of the image)."""
LOCAL_GLOBAL_AREA = 0.4
"""Largest area of a local crop, smallest area of a global one (share of the image)."""


@dataclass(frozen=True)
class DatasetStats:
    """The training images, of which a sample was measured."""

    images: int
    side: float
    """Median shorter side (pixels)."""
    labeled: bool = True
    """Whether a k-NN evaluation is possible."""
    rotated: int = 0
    """Images of the sample whose EXIF tag asks for a rotation."""


@dataclass(frozen=True)
class Suggestion:
    """A value for a key of the configuration."""

    key: str
    value: Any
    reason: str
    by_user: bool = False
    """Whether the user has set this value."""


@dataclass
class Suggestions:
    """Suggestions in order; values that the user has set replace them, and later suggestions build upon these."""

    user_values: Mapping[str, Any]
    items: list[Suggestion] = field(default_factory=list)

    def add(self, key: str, value: Any, reason: str) -> Any:
        """Add a suggestion; returns the user's value if there is one, else the suggested one."""
        by_user = key in self.user_values
        value = self.user_values.get(key, value)
        self.items.append(Suggestion(key, value, "yours" if by_user else reason, by_user))
        return value


def suggest_from_data(
    images: int,
    *,
    side: float,
    total_batch: int,
    epochs: float = 100,
    method: MethodConfig | None = None,
    backbone: BackboneConfig | None = None,
    optim: OptimConfig | None = None,
    user_values: Mapping[str, Any] | None = None,
) -> list[Suggestion]:
    """Apply the rule; method, backbone and optimizer are DINO, a ViT and AdamW by default.

    `side` is the median shorter side of the images (pixels), `total_batch` the images of an optimizer step, `epochs`
    the length of the run. `user_values`, by key, are kept, and the others are chosen to fit them. Keys that method,
    backbone or optimizer lack are left out.
    """
    suggestions, method = Suggestions(user_values or {}), method or DINOConfig()
    steps = max(1.0, epochs * images / total_batch)
    has_local = _crops(suggestions, side=side, method=method, backbone=backbone or ViTConfig())
    _scales(suggestions, side=side, has_local=has_local)
    _prototypes(suggestions, images=images, method=method)
    if isinstance(method, TeacherConfig) and method.teacher_update == "ema":
        _momentum(suggestions, total_batch=total_batch, steps=steps, method=method)
    if isinstance(method, DINOConfig) and method.loss == "cross_entropy":
        _temperature(suggestions)
    _rate(suggestions, total_batch=total_batch, steps=steps, optim=optim or AdamWConfig())
    return suggestions.items


def _crops(suggestions: Suggestions, *, side: float, method: MethodConfig, backbone: BackboneConfig) -> bool:
    """Patch size, number and sides of crops; returns whether there are local crops."""
    target = PAPER_GLOBAL if side >= PAPER_GLOBAL else max(side, MIN_TOKENS)
    target = suggestions.user_values.get("crops.global_size", target)
    patch = _patch_size(suggestions, target=target, backbone=backbone)
    global_size = max(int(target) // patch, 2) * patch
    why = "the paper's" if global_size == PAPER_GLOBAL else f"the images', {side:.0f} px"
    global_size = suggestions.add("crops.global_size", global_size, f"{why}, in whole patches")
    multi = isinstance(method, DINOConfig | SwAVConfig)
    why = "the paper's: k-NN 72.8, without 67.9" if multi else "none, as published for this method"
    count = suggestions.add("crops.local_count", 8 if multi else 0, why)
    if count:
        local = -(-PAPER_LOCAL * global_size // (PAPER_GLOBAL * patch)) * patch
        suggestions.add("crops.local_size", local, "the paper's 96 to 224, in whole patches")
    size = suggestions.add("crops.eval_size", global_size, "as the global crops")
    resize = max(PAPER_RESIZE * size // PAPER_GLOBAL, size) if side >= PAPER_RESIZE else size
    suggestions.add("crops.eval_resize", resize, "the paper's center crop" if resize > size else "the whole image")
    return bool(count)


def _patch_size(suggestions: Suggestions, *, target: float, backbone: BackboneConfig) -> int:
    """The patch size for global crops of about `target` pixels, of which all sides of crops are multiples."""
    if isinstance(backbone, TimmConfig) and backbone.patch_size is None:
        named = re.search(r"(?:patch|_p)(\d+)", backbone.name)
        return int(named[1]) if named else PATCH_SIZES[0]
    if not isinstance(backbone, ViTConfig | TimmConfig):
        return PATCH_SIZES[0]
    keys = ("crops.global_size", "crops.local_size")
    sides = [suggestions.user_values[key] for key in keys if key in suggestions.user_values]
    fitting = (patch for patch in PATCH_SIZES if target / patch >= MIN_TOKENS and not any(s % patch for s in sides))
    patch = next(fitting, PATCH_SIZES[-1])
    return suggestions.add("backbone.patch_size", patch, f"the largest with {MIN_TOKENS} x {MIN_TOKENS} tokens a crop")


def _scales(suggestions: Suggestions, *, side: float, has_local: bool) -> None:
    if not has_local:
        suggestions.add("crops.global_scale", [0.14, 1.0], "the paper's without local crops")
        return
    suggestions.add("crops.global_scale", [LOCAL_GLOBAL_AREA, 1.0], "the paper's; flat around it")
    low = min(max(round((MIN_LOCAL_PX / side) ** 2, 2), 0.05), LOCAL_GLOBAL_AREA / 2)
    why = "the paper's" if low == 0.05 else f"less shows under {MIN_LOCAL_PX} px of the image"
    suggestions.add("crops.local_scale", [low, LOCAL_GLOBAL_AREA], why)


def _prototypes(suggestions: Suggestions, *, images: int, method: MethodConfig) -> None:
    if not isinstance(method, DINOConfig | SwAVConfig):
        return  # in other methods this key is the width of an embedding
    most = MAX_PROTOTYPES if isinstance(method, DINOConfig) else type(method).out_dim
    count = 2 ** round(math.log2(max(images, 1) / IMAGES_PER_PROTOTYPE))
    count = min(max(count, MIN_PROTOTYPES), most)
    why = f"about {IMAGES_PER_PROTOTYPE} images each; flat around it" if count < most else "as published"
    suggestions.add("method.out_dim", count, why)
    key = "method.freeze_last_layer" if isinstance(method, DINOConfig) else "method.freeze_prototypes"
    suggestions.add(key, "1%", "the paper's 1 of 100 epochs")


def _momentum(suggestions: Suggestions, *, total_batch: int, steps: float, method: TeacherConfig) -> None:
    """The momentum whose horizon, 1 / (1 - momentum) steps, is the published one, or a share of a short run."""
    if isinstance(method, MoCoConfig):
        published, why = 1 / (1 - method.teacher_momentum), "its authors'"
    else:
        # 250 steps at 1024 images and 2000 at 256; nothing is published for smaller or larger batches.
        published = PAPER_HORIZON_STEPS * (PAPER_BATCH / min(total_batch, PAPER_BATCH)) ** 1.5
        published = min(published, SMALL_BATCH_HORIZON_STEPS)
        why = f"published for a batch of {min(max(total_batch, 256), PAPER_BATCH)}"
    horizon = max(min(published, MAX_HORIZON_SHARE * steps), MIN_HORIZON_STEPS)
    if horizon == MIN_HORIZON_STEPS:
        why = f"averages over {MIN_HORIZON_STEPS} steps; fewer collapsed"
    elif horizon < published:
        why = f"averages over {MAX_HORIZON_SHARE:.0%} of {steps:,.0f} steps"
    momentum = suggestions.add("method.teacher_momentum", _round_below_one(1 - 1 / horizon), why)
    if isinstance(method, MoCoConfig) and method.teacher_momentum_end < 1:
        suggestions.add("method.teacher_momentum_end", momentum, "constant, as its authors have it")


def _temperature(suggestions: Suggestions) -> None:
    final = suggestions.add("method.teacher_temperature", TEMPERATURE, "the paper's; 0.08 collapsed")
    start = suggestions.add("method.teacher_temperature_start", min(TEMPERATURE, final), "constant")
    rising = final > start
    why = "the paper's 30 of 300 epochs" if rising else "constant; a rise gained 0.1 in the paper"
    suggestions.add("method.teacher_temperature_warmup", "10%" if rising else "0ep", why)


def _rate(suggestions: Suggestions, *, total_batch: int, steps: float, optim: OptimConfig) -> None:
    if isinstance(optim, SGDConfig | LARSConfig):
        suggestions.add("optim.lr", 0.03 if isinstance(optim, SGDConfig) else 0.3, "published for ResNet-50")
    elif isinstance(optim, AdamWConfig):
        smaller = max(1.0, PAPER_BATCH / total_batch)
        shorter = max(1.0, PAPER_STEPS / steps)
        # Per 256 images. With the linear scaling rule, a step's rate never exceeds the paper's at a batch of 1024.
        rate = OptimConfig.lr * min(smaller**0.5 * shorter**0.25, smaller)
        small = f"small batch, short run; {rate * total_batch / 256:.2g} a step"
        why = small if smaller > 1 else "the paper's"
        suggestions.add("optim.lr", float(f"{rate:.2g}"), why)
    percent = min(max(MIN_WARMUP_PERCENT, math.ceil(WARMUP_STEPS / steps * 100)), MAX_WARMUP_PERCENT)
    longer = percent > MIN_WARMUP_PERCENT
    why = f"{percent * steps / 100:.0f} steps; fewer collapsed" if longer else "the paper's 10 of 100 epochs"
    suggestions.add("optim.lr_warmup", f"{percent}%", why)


def _round_below_one(share: float) -> float:
    """Round so that the difference to 1 keeps two significant digits."""
    return round(1 - float(f"{1 - share:.2g}"), 6)
