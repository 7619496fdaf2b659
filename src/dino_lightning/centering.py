"""Centring of the teacher's logits (equation 4 of the paper)."""

import torch
from torch import Tensor, nn

from dino_lightning.distributed import all_reduce_sum
from dino_lightning.numerics import at_least_float32


class Center(nn.Module):
    """Running mean of the teacher's logits, moved once per optimizer step.

    `observe` collects the logits of a micro-batch; `commit` averages all of them over the window of accumulation and
    over ranks and moves the centre: c <- m c + (1 - m) mean. A loss between two commits thus sees the old centre.
    """

    center: Tensor

    def __init__(self, out_dim: int, *, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, out_dim))
        # Plain attributes: as buffers, DDP would overwrite them with rank 0's at every forward.
        self._sum: Tensor | None = None
        self._count = 0

    @torch.no_grad()
    def observe(self, teacher_BK: Tensor) -> None:
        """Add the logits (B, K) of one micro-batch, both global views together."""
        batch_sum = at_least_float32(teacher_BK).sum(dim=0, keepdim=True)
        self._sum = batch_sum if self._sum is None else self._sum + batch_sum
        self._count += len(teacher_BK)

    @torch.no_grad()
    def commit(self) -> None:
        """Move the centre by what was observed since the last commit, on all ranks."""
        if self._sum is None:
            return
        # The counts differ between ranks only where the last batches do; summed beside the logits they cost nothing.
        packed = torch.cat([self._sum.flatten(), self._sum.new_tensor([self._count])])
        packed = all_reduce_sum(packed)
        mean = (packed[:-1] / packed[-1]).unsqueeze(0)
        self.center.mul_(self.momentum).add_(mean, alpha=1 - self.momentum)
        self._sum, self._count = None, 0
