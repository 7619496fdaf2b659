"""Embeddings of previous batches: MoCo's negatives, and additional rows for SwAV's assignment of small batches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_lightning.runtime.collectives import all_gather_concat


class FeatureQueue(nn.Module):
    """The latest `length` rows of width D, identical on all ranks; new rows replace the oldest.

    `observe` collects the rows of each micro-batch, `update` appends them once per optimizer step: losses before
    `update` use the previous queue. The rows of all ranks are appended in the order of ranks.
    """

    features: Tensor
    """(length, D) in no particular order."""
    position: Tensor
    """Index of the next row to write, int64 ()."""
    filled: Tensor
    """Rows written so far, at most `length`, int64 ()."""

    def __init__(self, length: int, width: int, *, start_random: bool) -> None:
        """With `start_random`, the queue starts with random unit vectors, as in MoCo; otherwise with zeros."""
        super().__init__()
        start = F.normalize(torch.randn(length, width), dim=-1) if start_random else torch.zeros(length, width)
        self.register_buffer("features", start)
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self._observed: list[Tensor] = []
        self._full = False

    @property
    def is_full(self) -> bool:
        """Whether every row has been written. Waits for the device until it is; a full queue stays full."""
        self._full = self._full or int(self.filled) == len(self.features)
        return self._full

    @torch.no_grad()
    def observe(self, rows_BD: Tensor) -> None:
        """Collect the rows (B, D) of one micro-batch of this rank; a collective call."""
        self._observed.append(all_gather_concat(rows_BD.detach()).to(self.features.dtype))

    @torch.no_grad()
    def update(self) -> None:
        """Append what was observed since the last update."""
        if not self._observed:
            return
        length = len(self.features)
        rows_ND = torch.cat(self._observed)[-length:]
        # Computed on the device, so that the host does not wait for the position.
        indices_N = (self.position + torch.arange(len(rows_ND), device=rows_ND.device)) % length
        self.features[indices_N] = rows_ND
        self.position.copy_((self.position + len(rows_ND)) % length)
        self.filled.copy_((self.filled + len(rows_ND)).clamp(max=length))
        self._observed.clear()

    def discard(self) -> None:
        """Drop what was observed since the last update: the step is skipped, or a checkpoint replaced the queue."""
        self._observed.clear()
        self._full = False
