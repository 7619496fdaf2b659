"""Logits that are not multiplied out."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import register_dataclass

from dino_lightning.runtime.precision import at_least_float32, without_autocast


@dataclass(frozen=True)
class FactoredLogits:
    """Logits (S, K) of S crops over K prototypes as what they are products of."""

    embeddings: Tensor
    """Of the crops (S, D), on the unit sphere of the bottleneck."""
    prototypes: Tensor
    """Their weight (K, D)."""

    def __len__(self) -> int:
        return len(self.embeddings)

    def logits(self, rows: slice = slice(None)) -> Tensor:
        """Some rows of the logits, multiplied out."""
        return F.linear(self.embeddings[rows], self.prototypes)

    def summed(self) -> Tensor:
        """The sum (1, K) of the logits of all crops, for the price of one crop's and in full precision."""
        with without_autocast(self.embeddings):
            return F.linear(
                at_least_float32(self.embeddings).sum(dim=0, keepdim=True), at_least_float32(self.prototypes)
            )


# What a network gives back is searched for tensors by FSDP; up to PyTorch 2.12 it looks into registered classes only.
register_dataclass(FactoredLogits)
