"""Collapse: the network's outputs become the same for all images. Which kind of collapse it is, and what to change.

Statistics are in nats, over one batch of global crops on all ranks. With p the teacher's output for a crop and m the
mean of p over crops,
    information = h(m) - mean h(p)
is the mutual information of an output and its image, from 0 to the logarithm of the number of crops. At 0 all images
have one output, and its entropy tells the kind of collapse.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino_lightning.runtime.precision import at_least_float32

MIN_INFORMATION = 0.05
"""Nats, below which outputs do not depend on their image. Healthy short runs stay above 0.2, collapsed ones fall to
0.03 and below (docs/collapse.md)."""
CONCENTRATED, SPREAD_OUT = 0.1, 0.95
"""Entropies as shares of ln K, below and above which an output counts as concentrated or spread out."""
MIN_SPREAD = 1 / 8
"""Spread of the features as a share of 1/sqrt(D), below which they are alike: their mean cosine is then 0.98."""
MIN_SPREAD_RATIO = 1 / 2
"""The spread must also fall below this share of its initial value: similar images have similar features at first."""
MIN_RANK = 2.0
"""Effective rank below which the features vary in nearly one direction only."""
DEAD_SHARE = 0.01
"""A prototype is dead if it gets less than this fraction of 1/K of the probability."""


class SettingChange(NamedTuple):
    """A change of a setting that may help against a collapse."""

    key: str
    to: str
    wanted: Callable[[Any], bool] = lambda value: True
    """Whether the current value may be the cause."""
    method: str | None = None
    """The only method for which it helps; None for all methods with this key."""


@dataclass(frozen=True, eq=False)
class CollapseKind:
    """A kind of collapse."""

    name: str
    what: str
    """Description of the symptom, as a clause."""
    changes: tuple[SettingChange, ...]
    """What helps, most likely first."""


_CENTER = SettingChange("method.centering", "set {key}=center", lambda value: value == "none")
_CENTER_MOMENTUM = SettingChange("method.center_momentum", "lower {key} to 0.9", lambda value: value > 0.99)
_EMA = SettingChange("method.teacher_update", "set {key}=ema", lambda value: value != "ema")
_MOMENTUM = SettingChange("method.teacher_momentum", "raise {key} to 0.996", lambda value: value < 0.98)
_BOTTLENECK = SettingChange("method.head_l2_bottleneck", "set {key}=true", lambda value: not value)
_PROTOTYPES = SettingChange("method.norm_last_layer", "set {key}=true", lambda value: not value)
_RATE = SettingChange("optim.lr", "lower {key}")
_WARMUP = SettingChange("optim.lr_warmup", "lengthen {key}")
_LR = (_RATE, _WARMUP)
_BATCH = SettingChange("data.batch_size_per_device", "raise {key}")
_PREDICTOR = SettingChange("method.predictor", "set {key}=true", lambda value: not value, method="BYOL")
_PREDICTOR_OFF = SettingChange("method.predictor", "set {key}=false", bool, method="DINO")
_NORM = SettingChange("method.head_batch_norm", "set {key}=true", lambda value: not value, method="BYOL")
_EPSILON = SettingChange("method.sinkhorn_epsilon", "lower {key}", lambda value: value > 0.03)
_SWAV = (_EPSILON, SettingChange("method.freeze_prototypes", "lengthen {key}"))
_TEMPERATURE = SettingChange("method.teacher_temperature", "lower {key} to 0.04", lambda value: value > 0.04)
_HIGH_TEMPERATURE = SettingChange("method.teacher_temperature", "lower {key} to 0.04", lambda value: value > 0.07)
_START = SettingChange("method.teacher_temperature_start", "lower {key} to 0.04", lambda value: value > 0.04)
_RISE = SettingChange("method.teacher_temperature_warmup", "lengthen {key}", lambda value: not value.startswith("0"))
_KOLEO = SettingChange("method.koleo_weight", "set {key}=0.1", lambda value: value == 0)

ONE_PROTOTYPE = CollapseKind(
    "one prototype",
    "the teacher gives nearly everything to one prototype, whatever the image",
    (_CENTER, _CENTER_MOMENTUM, _EMA, _BOTTLENECK, _PROTOTYPES, _RATE, _WARMUP),
)
UNIFORM = CollapseKind(
    "uniform",
    "the teacher gives every prototype the same, whatever the image",
    (_EMA, _TEMPERATURE, _START, _RISE, _PREDICTOR_OFF, _BOTTLENECK, *_SWAV, *_LR),
)
CONSTANT = CollapseKind(
    "constant",
    "the teacher has the same output for all images",
    (_EMA, _MOMENTUM, _CENTER, _CENTER_MOMENTUM, _HIGH_TEMPERATURE, _PREDICTOR_OFF, _BOTTLENECK, *_SWAV, *_LR, _BATCH),
)
ALIKE = CollapseKind(
    "alike",
    "the features of all images are nearly the same",
    (_PREDICTOR, _NORM, _EMA, _CENTER, _MOMENTUM, _RATE, _WARMUP, _BATCH),
)
LOW_RANK = CollapseKind(
    "low rank",
    "the features of all images lie in one direction",
    (_PREDICTOR, _NORM, _EMA, _KOLEO, _MOMENTUM, _RATE, _BATCH),
)
KINDS = {kind.name: kind for kind in (ONE_PROTOTYPE, UNIFORM, CONSTANT, ALIKE, LOW_RANK)}


def diagnose(
    statistics: Mapping[str, float], *, width: int = 0, spread_at_start: float = math.inf
) -> CollapseKind | None:
    """The kind of collapse that these statistics show, or None. Output statistics are checked first, being specific.

    The names are those of `metrics.csv` without `collapse/`; any may be missing. `width` is the width of the features.
    """
    if "mean_output_entropy" in statistics:
        kind = _of_outputs(statistics)
        if kind is not None:
            return kind
    spread = statistics.get("feature_std", math.inf)
    if spread * math.sqrt(width) < MIN_SPREAD and spread < MIN_SPREAD_RATIO * spread_at_start:
        return ALIKE
    return LOW_RANK if statistics.get("effective_rank", math.inf) < MIN_RANK else None


def _of_outputs(statistics: Mapping[str, float]) -> CollapseKind | None:
    entropy_of_mean, entropy = statistics["mean_output_entropy"], statistics["teacher_entropy"]
    if not entropy_of_mean - entropy < MIN_INFORMATION:
        return None
    most = entropy_of_mean + statistics["kl_to_uniform"]  # ln K
    share = entropy / most if most > 0 else 0.0
    if share < CONCENTRATED:
        return ONE_PROTOTYPE
    return UNIFORM if share > SPREAD_OUT else CONSTANT


def changes(kind: CollapseKind, settings: Mapping[str, Any], *, method: str) -> list[str]:
    """Which of these settings (by dotted name) to change, most likely first."""
    return [
        f"{change.to.format(key=change.key)} (now {_written(settings[change.key])})"
        for change in kind.changes
        if change.key in settings and change.wanted(settings[change.key]) and change.method in (None, method)
    ]


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@torch.no_grad()
def effective_rank(features_ND: Tensor) -> Tensor:
    """RankMe (Garrido et al., ICML 2023): exp of the entropy of the singular values, normalized to a sum of 1.

    From 1, if all features are multiples of one vector, to min(N, D). Computed on the CPU, since not every accelerator
    has an SVD.
    """
    values = torch.linalg.svdvals(at_least_float32(features_ND).cpu())
    return torch.special.entr(values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)).sum().exp()


@torch.no_grad()
def dead_prototypes(total_K: Tensor) -> Tensor:
    """Share of prototypes with less than `DEAD_SHARE` of the mean probability (scalar)."""
    return (total_K < DEAD_SHARE * total_K.mean()).double().mean()
