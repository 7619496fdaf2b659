"""Centring of the teacher's logits (equation 4 of the paper)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dino_lightning.distributed import all_reduce_sum_later
from dino_lightning.numerics import at_least_float32


class Center(nn.Module):
    """Running mean of the teacher's logits, moved once per optimizer step.

    `observe` sends the sum of a micro-batch to the other ranks, which travels while student and gradient are computed;
    `commit` averages all sums of the window of accumulation and moves the centre: c <- m c + (1 - m) mean. A loss
    between two commits thus sees the old centre.
    """

    center: Tensor

    def __init__(self, out_dim: int, *, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, out_dim))
        # A plain attribute: buffers are overwritten with rank 0's by DDP at every forward.
        self._sums: list[Callable[[], Tensor]] = []

    @torch.no_grad()
    def observe(self, sum_1K: Tensor, *, count: int) -> None:
        """Send the sum (1, K) over the `count` rows of logits of one micro-batch, both global views together."""
        row_K = at_least_float32(sum_1K).flatten()
        # The counts differ between ranks only where the last batches do; summed beside the logits they cost nothing.
        # `new_full` and not `new_tensor`: it is filled on the device, while a number from here is waited for.
        self._sums.append(all_reduce_sum_later(torch.cat([row_K, row_K.new_full((1,), count)])))

    @torch.no_grad()
    def observe_logits(self, teacher_BK: Tensor) -> None:
        """`observe` the logits (B, K) of one micro-batch."""
        self.observe(at_least_float32(teacher_BK).sum(dim=0, keepdim=True), count=len(teacher_BK))

    @torch.no_grad()
    def commit(self) -> None:
        """Move the centre by what was observed since the last commit, on all ranks."""
        if not self._sums:
            return
        total = torch.stack([sum_of_ranks() for sum_of_ranks in self._sums]).sum(dim=0)
        mean_1K = (total[:-1] / total[-1]).unsqueeze(0)
        self.center.mul_(self.momentum).add_(mean_1K, alpha=1 - self.momentum)
        self._sums.clear()
