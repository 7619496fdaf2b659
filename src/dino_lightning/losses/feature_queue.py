"""Embeddings of former batches: the negatives of MoCo, and what joins a small batch in SwAV's assignment."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_lightning.runtime.collectives import all_gather_concat


class FeatureQueue(nn.Module):
    """The latest `length` rows of width D, over all ranks alike; the oldest make room.

    Rows are observed with each micro-batch and enter with `commit`, once per optimizer step: a loss between two commits
    sees the old queue. The rows of all ranks enter in the order of ranks, so every rank holds the same queue.
    """

    features: Tensor
    """(length, D) in no particular order."""
    position: Tensor
    """Where the next row goes, int64 ()."""
    filled: Tensor
    """Rows that have entered so far, at most `length`, int64 ()."""

    def __init__(self, length: int, width: int, *, start_random: bool) -> None:
        """With `start_random`, unit vectors stand in the place of rows that have not entered yet, as in MoCo."""
        super().__init__()
        start = F.normalize(torch.randn(length, width), dim=-1) if start_random else torch.zeros(length, width)
        self.register_buffer("features", start)
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self._observed: list[Tensor] = []
        self._full = False

    @property
    def is_full(self) -> bool:
        """Whether every row has been written. A full queue stays full, so only one that is not waits for the device."""
        self._full = self._full or int(self.filled) == len(self.features)
        return self._full

    @torch.no_grad()
    def observe(self, rows_BD: Tensor) -> None:
        """Note the rows (B, D) of one micro-batch of this rank; all ranks call it together."""
        self._observed.append(all_gather_concat(rows_BD.detach()).to(self.features.dtype))

    @torch.no_grad()
    def update(self) -> None:
        """Let what was observed since the last commit enter."""
        if not self._observed:
            return
        length = len(self.features)
        rows_ND = torch.cat(self._observed)[-length:]
        # Positions on the device, so that nothing waits for the pointer.
        places_N = (self.position + torch.arange(len(rows_ND), device=rows_ND.device)) % length
        self.features[places_N] = rows_ND
        self.position.copy_((self.position + len(rows_ND)) % length)
        self.filled.copy_((self.filled + len(rows_ND)).clamp(max=length))
        self._observed.clear()

    def discard(self) -> None:
        """Drop what was observed since the last commit: its step is not taken, or the queue was read from a file."""
        self._observed.clear()
        self._full = False
