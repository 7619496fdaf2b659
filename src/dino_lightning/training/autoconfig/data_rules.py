"""Settings by number and size of the images: a rule, with its reasons.

For ImageNet, a side of 256 pixels or more and a total batch of 1024 it gives the paper's settings. From there it moves
with what is smaller; docs/small_data.md says how each line was found. It knows neither files nor devices: `suggested`
measures the images and sets the keys.
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
PROTOTYPES = (64, 65536)
"""Fewest and most."""
PAPER_BATCH, PAPER_WINDOW, SMALL_BATCH_WINDOW = 1024, 250, 2000
"""Total batch of the paper; steps that the teacher averages over, 1 / (1 - momentum), there and at 256 images."""
WINDOW_SHARE = 0.05
"""Largest window of the teacher (share of the run's steps)."""
WINDOW_STEPS = 50
"""Smallest window, whatever its share: a teacher that follows faster was seen to collapse."""
TEMPERATURE = 0.04
PAPER_STEPS = 125_000
"""Of 100 epochs of ImageNet."""
WARMUP_STEPS, WARMUP_SHARES = 100, (10, 30)
"""Steps of the learning rate's warm-up where a run has room for them; its least and largest share (per cent)."""
PAPER_GLOBAL, PAPER_LOCAL, PAPER_RESIZE = 224, 96, 256
"""Sides of the crops, and of an image for evaluation (pixels)."""
PATCHES = (16, 8, 4, 2, 1)
TOKENS = 8
"""Fewest tokens along a global crop."""
SEEN_PIXELS = 14
"""Smallest side of what a local crop shows (pixels of the image)."""
SPLIT = 0.4
"""Area below which a crop is local, above which global (share of the image)."""


@dataclass(frozen=True)
class Suggestion:
    """One key."""

    key: str
    value: Any
    reason: str
    yours: bool = False
    """Set by the user: the value is theirs."""


@dataclass
class Suggestions:
    """Suggestions in order; what the user has set stays, and what follows builds upon it."""

    given: Mapping[str, Any]
    rows: list[Suggestion] = field(default_factory=list)

    def add(self, key: str, value: Any, reason: str) -> Any:
        """Take down a suggestion; returns the value that counts."""
        yours = key in self.given
        self.rows.append(Suggestion(key, self.given.get(key, value), "yours" if yours else reason, yours))
        return self.rows[-1].value


def suggest_from_data(
    images: int,
    *,
    side: float,
    total_batch: int,
    epochs: float = 100,
    method: MethodConfig | None = None,
    backbone: BackboneConfig | None = None,
    optim: OptimConfig | None = None,
    given: Mapping[str, Any] | None = None,
) -> list[Suggestion]:
    """The rule. DINO, a ViT and AdamW, unless said otherwise.

    `side` is the median shorter side of the images (pixels), `total_batch` the images of an optimizer step, `epochs`
    the length of the run. `given` holds what the user has set, by key: it is kept, and the rest is chosen to fit it.
    Keys that method, network or optimizer lack are left out.
    """
    rows, method = Suggestions(given or {}), method or DINOConfig()
    steps = max(1.0, epochs * images / total_batch)
    several = _crops(rows, side=side, method=method, backbone=backbone or ViTConfig())
    _scales(rows, side=side, several=several)
    _prototypes(rows, images=images, method=method)
    if isinstance(method, TeacherConfig) and method.teacher_update == "ema":
        _momentum(rows, total_batch=total_batch, steps=steps, method=method)
    if isinstance(method, DINOConfig) and method.loss == "cross_entropy":
        _temperature(rows)
    _rate(rows, total_batch=total_batch, steps=steps, optim=optim or AdamWConfig())
    return rows.rows


def _crops(rows: Suggestions, *, side: float, method: MethodConfig, backbone: BackboneConfig) -> bool:
    """Patch size, number and sides of crops; returns whether there are local ones."""
    whole = rows.given.get("crops.global_size", PAPER_GLOBAL if side >= PAPER_GLOBAL else max(side, TOKENS))
    patch = _patch(rows, whole=whole, backbone=backbone)
    room = max(int(whole) // patch, 2) * patch
    why = "the paper's" if room == PAPER_GLOBAL else f"the images', {side:.0f} px"
    room = rows.add("crops.global_size", room, f"{why}, in whole patches")
    multi = isinstance(method, DINOConfig | SwAVConfig)
    why = "the paper's: k-NN 72.8, without 67.9" if multi else "none, as published for this method"
    count = rows.add("crops.local_count", 8 if multi else 0, why)
    if count:
        local = -(-PAPER_LOCAL * room // (PAPER_GLOBAL * patch)) * patch
        rows.add("crops.local_size", local, "the paper's 96 to 224, in whole patches")
    size = rows.add("crops.eval_size", room, "as the global crops")
    resize = max(PAPER_RESIZE * size // PAPER_GLOBAL, size) if side >= PAPER_RESIZE else size
    rows.add("crops.eval_resize", resize, "the paper's center crop" if resize > size else "the whole image")
    return bool(count)


def _patch(rows: Suggestions, *, whole: float, backbone: BackboneConfig) -> int:
    """What sides of crops are multiples of."""
    if isinstance(backbone, TimmConfig) and backbone.patch_size is None:
        named = re.search(r"(?:patch|_p)(\d+)", backbone.name)
        return int(named[1]) if named else PATCHES[0]
    if not isinstance(backbone, ViTConfig | TimmConfig):
        return PATCHES[0]
    sides = [rows.given[key] for key in ("crops.global_size", "crops.local_size") if key in rows.given]
    fit = [patch for patch in PATCHES if whole / patch >= TOKENS and not any(side % patch for side in sides)]
    patch = fit[0] if fit else PATCHES[-1]
    return rows.add("backbone.patch_size", patch, f"the largest with {TOKENS} x {TOKENS} tokens a crop")


def _scales(rows: Suggestions, *, side: float, several: bool) -> None:
    if not several:
        rows.add("crops.global_scale", [0.14, 1.0], "the paper's without local crops")
        return
    rows.add("crops.global_scale", [SPLIT, 1.0], "the paper's; flat around it")
    low = min(max(round((SEEN_PIXELS / side) ** 2, 2), 0.05), SPLIT / 2)
    why = "the paper's" if low == 0.05 else f"less shows under {SEEN_PIXELS} px of the image"
    rows.add("crops.local_scale", [low, SPLIT], why)


def _prototypes(rows: Suggestions, *, images: int, method: MethodConfig) -> None:
    if not isinstance(method, DINOConfig | SwAVConfig):
        return  # to the others it is the width of an embedding
    most = PROTOTYPES[1] if isinstance(method, DINOConfig) else type(method).out_dim
    count = 2 ** round(math.log2(max(images, 1) / IMAGES_PER_PROTOTYPE))
    count = min(max(count, PROTOTYPES[0]), most)
    why = f"about {IMAGES_PER_PROTOTYPE} images each; flat around it" if count < most else "as published"
    rows.add("method.out_dim", count, why)
    key = "method.freeze_last_layer" if isinstance(method, DINOConfig) else "method.freeze_prototypes"
    rows.add(key, "1%", "the paper's 1 of 100 epochs")


def _momentum(rows: Suggestions, *, total_batch: int, steps: float, method: TeacherConfig) -> None:
    """The momentum whose window, 1 / (1 - m) steps, is the published one, or a share of a short run."""
    if isinstance(method, MoCoConfig):
        published, why = 1 / (1 - method.teacher_momentum), "its authors'"
    else:
        # 250 steps at 1024 images and 2000 at 256; neither below nor above anything is published.
        published = PAPER_WINDOW * (PAPER_BATCH / min(total_batch, PAPER_BATCH)) ** 1.5
        published = min(published, SMALL_BATCH_WINDOW)
        why = f"published for a batch of {min(max(total_batch, 256), PAPER_BATCH)}"
    window = max(min(published, WINDOW_SHARE * steps), WINDOW_STEPS)
    if window == WINDOW_STEPS:
        why = f"averages over {WINDOW_STEPS} steps; fewer collapsed"
    elif window < published:
        why = f"averages over {WINDOW_SHARE:.0%} of {steps:,.0f} steps"
    momentum = rows.add("method.teacher_momentum", _round_below_one(1 - 1 / window), why)
    if isinstance(method, MoCoConfig) and method.teacher_momentum_end < 1:
        rows.add("method.teacher_momentum_end", momentum, "constant, as its authors have it")


def _temperature(rows: Suggestions) -> None:
    final = rows.add("method.teacher_temperature", TEMPERATURE, "the paper's; 0.08 collapsed")
    start = rows.add("method.teacher_temperature_start", min(TEMPERATURE, final), "constant")
    rising = final > start
    why = "the paper's 30 of 300 epochs" if rising else "constant; a rise gained 0.1 in the paper"
    rows.add("method.teacher_temperature_warmup", "10%" if rising else "0ep", why)


def _rate(rows: Suggestions, *, total_batch: int, steps: float, optim: OptimConfig) -> None:
    if isinstance(optim, SGDConfig | LARSConfig):
        rows.add("optim.lr", 0.03 if isinstance(optim, SGDConfig) else 0.3, "published for ResNet-50")
    elif isinstance(optim, AdamWConfig):
        smaller = max(1.0, PAPER_BATCH / total_batch)
        shorter = max(1.0, PAPER_STEPS / steps)
        # Per 256 images: with the linear rule, a step's own rate at a smaller batch is at most the paper's at 1024.
        rate = OptimConfig.lr * min(smaller**0.5 * shorter**0.25, smaller)
        small = f"small batch, short run; {rate * total_batch / 256:.2g} a step"
        why = small if smaller > 1 else "the paper's"
        rows.add("optim.lr", float(f"{rate:.2g}"), why)
    share = min(max(WARMUP_SHARES[0], math.ceil(WARMUP_STEPS / steps * 100)), WARMUP_SHARES[1])
    longer = share > WARMUP_SHARES[0]
    why = f"{share * steps / 100:.0f} steps; fewer collapsed" if longer else "the paper's 10 of 100 epochs"
    rows.add("optim.lr_warmup", f"{share}%", why)


def _round_below_one(share: float) -> float:
    """To two digits of what is missing to 1."""
    return round(1 - float(f"{1 - share:.2g}"), 6)
