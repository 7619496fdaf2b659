"""Logits kept as the product embeddings x prototypes, multiplied only when needed."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import register_dataclass

from dino_lightning.runtime.precision import at_least_float32, without_autocast


@dataclass(frozen=True)
class FactoredLogits:
    """Logits (S, K) of S crops over K prototypes, as their two factors."""

    embeddings: Tensor
    """Bottleneck outputs of the crops (S, D), usually of length 1."""
    prototypes: Tensor
    """Weight of the prototypes (K, D)."""

    def __len__(self) -> int:
        return len(self.embeddings)

    def logits(self, rows: slice = slice(None)) -> Tensor:
        """The logits of some rows."""
        return F.linear(self.embeddings[rows], self.prototypes)

    def summed(self) -> Tensor:
        """The sum (1, K) of the logits of all crops, at the cost of one crop and in full precision."""
        with without_autocast(self.embeddings):
            return F.linear(
                at_least_float32(self.embeddings).sum(dim=0, keepdim=True), at_least_float32(self.prototypes)
            )


# FSDP searches the outputs of a network for tensors; up to PyTorch 2.12 it searches registered classes only.
register_dataclass(FactoredLogits)
