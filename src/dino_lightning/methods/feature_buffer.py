"""What logging steps have seen over a while: figures that one batch is too small for."""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from dino_lightning.methods.collapse import dead_prototypes, effective_rank
from dino_lightning.runtime.collectives import all_gather_concat, all_reduce_mean, world_size
from dino_lightning.runtime.precision import at_least_float32

MOST_ROWS = 2048
"""Features kept, over all ranks; the latest."""


class FeatureBuffer:
    """Features and outputs of logging steps, kept on their device until a figure is made of them.

    Adding some waits for nothing. What a rank cannot know by itself is asked of all ranks together.
    """

    def __init__(self) -> None:
        self.width = 0
        """Of the features; 0 until there are some."""
        self._features: deque[Tensor] = deque()
        self._total_K: Tensor | None = None
        self._crops = 0

    @torch.no_grad()
    def add_features(self, features_SD: Tensor) -> None:
        """Keep them; the oldest make room."""
        most, self.width = _share(), features_SD.shape[1]
        self._features.append(at_least_float32(features_SD[:most]).clone())
        while sum(map(len, self._features)) - len(self._features[0]) >= most:
            self._features.popleft()

    @torch.no_grad()
    def add_output(self, mean_K: Tensor, *, crops: int) -> None:
        """Add the mean output over so many crops, those of all ranks."""
        # A step that is left out since its loss is not finite would leave its mark here for good.
        total_K = crops * torch.where(mean_K.isfinite().all(), mean_K, torch.zeros_like(mean_K))
        self._total_K = total_K if self._total_K is None else self._total_K + total_K
        self._crops += crops

    def take_effective_rank(self) -> float | None:
        """The effective rank of all ranks' features; None while they are fewer than wide (than half of `MOST_ROWS`)."""
        if not self._features:
            return None
        features_ND = all_gather_concat(torch.cat(list(self._features))[-_share() :])
        features_ND = features_ND[features_ND.isfinite().all(dim=1)]  # none of a step that was left out
        if len(features_ND) < min(features_ND.shape[1], MOST_ROWS // 2):
            return None
        self._features.clear()
        # Ranks have the same features; the mean is for those whose arithmetic differs in the last bit.
        return float(all_reduce_mean(effective_rank(features_ND)))

    def take_dead_prototypes(self) -> float | None:
        """The share of dead prototypes; None until there was a crop for each prototype."""
        if self._total_K is None or self._crops < len(self._total_K):
            return None
        share, self._total_K, self._crops = dead_prototypes(self._total_K), None, 0
        return float(share)

    def state_dict(self) -> dict[str, Any]:
        """What is kept, on the CPU."""
        features = [features_SD.cpu() for features_SD in self._features]
        total = None if self._total_K is None else self._total_K.cpu()
        return {"width": self.width, "features": features, "total": total, "crops": self._crops}

    def load_state_dict(self, state: dict[str, Any], *, device: torch.device) -> None:
        """Go on from there."""
        self.width, self._crops = state["width"], state["crops"]
        self._features = deque(features_SD.to(device) for features_SD in state["features"])
        self._total_K = None if state["total"] is None else state["total"].to(device)


def _share() -> int:
    """Of this rank in `MOST_ROWS`."""
    return max(1, MOST_ROWS // world_size())
