"""Features and outputs of the latest logging steps, for statistics that one batch is too small for."""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from dino_lightning.methods.collapse import dead_prototypes, effective_rank
from dino_lightning.runtime.collectives import all_gather_concat, all_reduce_mean, world_size
from dino_lightning.runtime.precision import at_least_float32

MAX_FEATURES = 2048
"""Number of latest features that are kept, over all ranks."""


class FeatureBuffer:
    """Keeps features and outputs of logging steps on their device until a statistic is computed from them.

    The `add_*` methods never wait for the device; the `take_*` methods are collective calls.
    """

    def __init__(self) -> None:
        self.width = 0
        """Width of the features; 0 before the first."""
        self._features: deque[Tensor] = deque()
        self._total_K: Tensor | None = None
        self._crops = 0

    @torch.no_grad()
    def add_features(self, features_SD: Tensor) -> None:
        """Append features (S, D); the oldest are dropped."""
        limit, self.width = _max_per_rank(), features_SD.shape[1]
        self._features.append(at_least_float32(features_SD[:limit]).clone())
        while sum(map(len, self._features)) - len(self._features[0]) >= limit:
            self._features.popleft()

    @torch.no_grad()
    def add_output(self, mean_K: Tensor, *, crops: int) -> None:
        """Add the mean output (K,) over `crops` crops, counted over all ranks."""
        # A value that is not finite, of a step that is skipped for it, would stay in the sum forever.
        total_K = crops * torch.where(mean_K.isfinite().all(), mean_K, torch.zeros_like(mean_K))
        self._total_K = total_K if self._total_K is None else self._total_K + total_K
        self._crops += crops

    def take_effective_rank(self) -> float | None:
        """The effective rank of all ranks' features; None while there are fewer than their width (at most 1024)."""
        if not self._features:
            return None
        features_ND = all_gather_concat(torch.cat(list(self._features))[-_max_per_rank() :])
        features_ND = features_ND[features_ND.isfinite().all(dim=1)]  # without those of skipped steps
        if len(features_ND) < min(features_ND.shape[1], MAX_FEATURES // 2):
            return None
        self._features.clear()
        # Ranks have the same features, but on different CPUs the result can differ in the last bit.
        return float(all_reduce_mean(effective_rank(features_ND)))

    def take_dead_prototypes(self) -> float | None:
        """The share of dead prototypes; None until there were as many crops as prototypes."""
        if self._total_K is None or self._crops < len(self._total_K):
            return None
        share, self._total_K, self._crops = dead_prototypes(self._total_K), None, 0
        return float(share)

    def state_dict(self) -> dict[str, Any]:
        """The contents, on the CPU."""
        features = [features_SD.cpu() for features_SD in self._features]
        total = None if self._total_K is None else self._total_K.cpu()
        return {"width": self.width, "features": features, "total": total, "crops": self._crops}

    def load_state_dict(self, state: dict[str, Any], *, device: torch.device) -> None:
        """Restore the contents."""
        self.width, self._crops = state["width"], state["crops"]
        self._features = deque(features_SD.to(device) for features_SD in state["features"])
        self._total_K = None if state["total"] is None else state["total"].to(device)


def _max_per_rank() -> int:
    return max(1, MAX_FEATURES // world_size())
