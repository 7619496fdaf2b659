"""The center that is subtracted from the teacher's logits, so that no prototype gets all the probability.

The paper's center is a running mean (equation 4). Sinkhorn-Knopp, its alternative in table 7, scales the matrix of
exp(logits / temperature) until every prototype gets the same share of the batch and every image a sum of 1. The last
division is a softmax, and the scales of the prototypes are a subtraction inside it:

    exp(t_bk / tau) r_k / sum_j exp(t_bj / tau) r_j = softmax_k((t_bk - c_k) / tau)   with c_k = -tau log r_k

So Sinkhorn-Knopp is a center, too, one of a single batch, and the losses need not distinguish them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dino_lightning.models.factored_logits import FactoredLogits
from dino_lightning.runtime.collectives import all_reduce_max, all_reduce_sum, all_reduce_sum_later
from dino_lightning.runtime.precision import at_least_float32


class Centering(nn.Module, ABC):
    """Computes what DINO subtracts from the teacher's logits."""

    center: Tensor
    """The latest center (1, K)."""

    @abstractmethod
    def center_for(self, teacher: FactoredLogits, *, temperature: float) -> Tensor:
        """The center (1, K) for the logits of one micro-batch; a collective call."""

    def update(self) -> None:
        """Called once per optimizer step."""

    def discard(self) -> None:
        """Drop what was observed since the last update, because the step is skipped."""


class NoCenter(Centering):
    """Subtracts nothing."""

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
        # It belongs to one batch, so no checkpoint needs it.
        self.register_buffer("center", torch.zeros(1, out_dim), persistent=False)

    @torch.no_grad()
    def center_for(self, teacher: FactoredLogits, *, temperature: float) -> Tensor:
        """The center that gives the assignment of this batch."""
        logits_NK = at_least_float32(teacher.logits())
        self.center.copy_(sinkhorn_center(logits_NK, temperature=temperature, iterations=self.iterations))
        return self.center


@torch.no_grad()
def sinkhorn_center(logits_NK: Tensor, *, temperature: float, iterations: int) -> Tensor:
    """Center c (1, K) with which softmax((t - c) / temperature) is the Sinkhorn-Knopp assignment of all ranks' rows.

    Each iteration divides every prototype by its sum over images, then every image by its sum over prototypes. Computed
    in logarithms: at a temperature of 0.04 the exponentials overflow float32 for logits above 3.
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
    # A rank may have no rows (of masked patches).
    largest_1K = x_NK.amax(dim=0, keepdim=True) if len(x_NK) else x_NK.new_full((1, x_NK.shape[1]), -torch.inf)
    largest_1K = all_reduce_max(largest_1K)
    return all_reduce_sum((x_NK - largest_1K).exp().sum(dim=0, keepdim=True)).log() + largest_1K


class Center(Centering):
    """Running mean of the teacher's logits, updated once per optimizer step.

    `observe` starts an all-reduce of a micro-batch's sum, which overlaps with the student's forward and backward pass.
    `update` averages the sums of all micro-batches of the step: c <- m c + (1 - m) mean. Losses before `update` use the
    previous center.
    """

    def __init__(self, out_dim: int, *, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, out_dim))
        # Not a buffer: DDP overwrites buffers with those of rank 0 in every forward pass.
        self._sums: list[Callable[[], Tensor]] = []

    def center_for(self, teacher: FactoredLogits, *, temperature: float) -> Tensor:
        """The previous center; observes the logits, whose sum is the logits of the summed embeddings."""
        self.observe(teacher.summed(), count=len(teacher))
        return self.center

    @torch.no_grad()
    def observe(self, sum_1K: Tensor, *, count: int) -> None:
        """Add the sum (1, K) over the `count` rows of logits of one micro-batch, both global views together."""
        row_K = at_least_float32(sum_1K).flatten()
        # The counts differ between ranks only in a last, smaller batch; they are summed in the same exchange.
        # `new_full` is filled on the device; `new_tensor` would wait for a copy from the host.
        self._sums.append(all_reduce_sum_later(torch.cat([row_K, row_K.new_full((1,), count)])))

    @torch.no_grad()
    def update(self) -> None:
        """Update the center from what all ranks observed since the last update."""
        if not self._sums:
            return
        total = torch.stack([sum_of_ranks() for sum_of_ranks in self._sums]).sum(dim=0)
        mean_1K = (total[:-1] / total[-1]).unsqueeze(0)
        updated_1K = self.center.mul(self.momentum).add_(mean_1K, alpha=1 - self.momentum)
        # Without any row on any rank (of masked patches) the center stays; decided on the device, without waiting.
        self.center.copy_(torch.where(total[-1] > 0, updated_1K, self.center))
        self._sums.clear()

    def discard(self) -> None:
        """Drop the sums of the skipped step."""
        self._sums.clear()
