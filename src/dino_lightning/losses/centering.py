"""What is subtracted from the teacher's logits so that no prototype takes everything.

The paper's center is a running mean (equation 4). Sinkhorn-Knopp, its alternative in table 7, scales the matrix of
exp(logits / temperature) until every prototype gets the same share of the batch and every image a sum of 1. The last
division is a softmax, and the scales of the prototypes before it are a subtraction inside it:

    exp(t_bk / tau) r_k / sum_j exp(t_bj / tau) r_j = softmax_k((t_bk - c_k) / tau)   with c_k = -tau log r_k

So it, too, is a center, of one batch, and everything that is made for centers serves it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dino_lightning.models.factored_logits import FactoredLogits
from dino_lightning.runtime.collectives import all_reduce_max, all_reduce_sum, all_reduce_sum_later
from dino_lightning.runtime.precision import at_least_float32


class Centering(nn.Module, ABC):
    """What DINO subtracts from the teacher's logits."""

    center: Tensor
    """The latest shift (1, K)."""

    @abstractmethod
    def center_for(self, teacher: FactoredLogits, *, temperature: float) -> Tensor:
        """The shift (1, K) for the logits of one micro-batch; all ranks call it together."""

    def update(self) -> None:
        """End an optimizer step."""

    def discard(self) -> None:
        """Drop what was observed since the last commit: its step is not taken."""


class NoCenter(Centering):
    """Nothing is subtracted."""

    def __init__(self, out_dim: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(1, out_dim))

    def center_for(self, teacher: FactoredLogits, *, temperature: float) -> Tensor:
        """Zeros."""
        return self.center


class SinkhornCenter(Centering):
    """Sinkhorn-Knopp over the micro-batches of all ranks; with one iteration, a softmax over the batch."""

    def __init__(self, out_dim: int, *, iterations: int) -> None:
        super().__init__()
        self.iterations = iterations
        # Of one batch only: nothing that a checkpoint must keep.
        self.register_buffer("center", torch.zeros(1, out_dim), persistent=False)

    @torch.no_grad()
    def center_for(self, teacher: FactoredLogits, *, temperature: float) -> Tensor:
        """The shift that the assignment of this batch amounts to."""
        logits_NK = at_least_float32(teacher.logits())
        self.center.copy_(sinkhorn_center(logits_NK, temperature=temperature, iterations=self.iterations))
        return self.center


@torch.no_grad()
def sinkhorn_center(logits_NK: Tensor, *, temperature: float, iterations: int) -> Tensor:
    """Shift c (1, K) with which softmax((t - c) / temperature) is the Sinkhorn-Knopp assignment of all ranks' rows.

    Each iteration divides every prototype by its sum over images, then every image by its sum over prototypes. In
    logarithms: at a temperature of 0.04 the exponentials themselves leave float32 for logits above 3.
    """
    scaled_NK = logits_NK / temperature
    row_N1 = scaled_NK.new_zeros(len(scaled_NK), 1)
    column_1K = scaled_NK.new_zeros(1, scaled_NK.shape[1])
    for iteration in range(iterations):
        if iteration:
            row_N1 = -(scaled_NK + column_1K).logsumexp(dim=1, keepdim=True)
        column_1K = -_logsumexp_over_ranks(scaled_NK + row_N1)
    return -temperature * column_1K


def _logsumexp_over_ranks(x_NK: Tensor) -> Tensor:
    # A rank may have no rows.
    largest_1K = x_NK.amax(dim=0, keepdim=True) if len(x_NK) else x_NK.new_full((1, x_NK.shape[1]), -torch.inf)
    largest_1K = all_reduce_max(largest_1K)
    return all_reduce_sum((x_NK - largest_1K).exp().sum(dim=0, keepdim=True)).log() + largest_1K


class Center(Centering):
    """Running mean of the teacher's logits, moved once per optimizer step.

    `observe` sends the sum of a micro-batch to the other ranks, which travels while student and gradient are computed;
    `commit` averages all sums of the window of accumulation and moves the center: c <- m c + (1 - m) mean. A loss
    between two commits thus sees the old center.
    """

    def __init__(self, out_dim: int, *, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, out_dim))
        # A plain attribute: buffers are overwritten with rank 0's by DDP at every forward.
        self._sums: list[Callable[[], Tensor]] = []

    def center_for(self, teacher: FactoredLogits, *, temperature: float) -> Tensor:
        """The old center; the new one is on its way. The sum of logits is the logits of the sum."""
        self.observe(teacher.summed(), count=len(teacher))
        return self.center

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
    def update(self) -> None:
        """Move the center by what was observed since the last commit, on all ranks."""
        if not self._sums:
            return
        total = torch.stack([sum_of_ranks() for sum_of_ranks in self._sums]).sum(dim=0)
        mean_1K = (total[:-1] / total[-1]).unsqueeze(0)
        moved_1K = self.center.mul(self.momentum).add_(mean_1K, alpha=1 - self.momentum)
        # No rank may have had a row (of masked patches): the center stays. The host does not know and need not.
        self.center.copy_(torch.where(total[-1] > 0, moved_1K, self.center))
        self._sums.clear()

    def discard(self) -> None:
        """The center stays."""
        self._sums.clear()
