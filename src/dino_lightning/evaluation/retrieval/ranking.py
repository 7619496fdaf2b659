"""Average precision of ranked images, by the rules of revisited Oxford and Paris and of Holidays and Copydays.

    order = database images by descending similarity; among equal ones the lower index first
    junk  is removed from the ranking: the images after it move up
    AP    = area under precision over recall, by trapezoids: a positive at rank r (from 0) with j positives before it
            adds (j / r + (j + 1) / (r + 1)) / 2 / number of positives, where 0 / 0 = 1
    mP@k  = share of positives among the first k, or up to the rank of the last positive if that is smaller

A query without positives is excluded from all means. Q queries, N database images, R ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NOT_RETRIEVABLE = -torch.inf
"""The similarity of a database image that cannot be retrieved; a positive among these counts as not found."""


@dataclass(frozen=True)
class Ranking:
    """The quality of a ranking; shares from 0 to 1, NaN for a query without positives."""

    ap: Tensor
    """Average precision of each query, (Q,)."""
    precision: Tensor
    """Precision of each query at each k, (Q, K)."""

    @property
    def queries(self) -> int:
        """Number of queries with positives."""
        return int(self.ap.isfinite().sum())

    @property
    def map(self) -> float:
        """Mean average precision; NaN without such a query."""
        return float(self.ap.nanmean())

    @property
    def mean_precision(self) -> list[float]:
        """mP@k, one for each k."""
        return self.precision.nanmean(dim=0).tolist()


def rank_database(
    similarity_QN: Tensor,
    *,
    positives: Sequence[Sequence[int]],
    junk: Sequence[Sequence[int]],
    at: Sequence[int] = (1, 5, 10),
) -> Ranking:
    """Rank the whole database for each query; `positives` and `junk` are unique database indices."""
    sorted_QN, order_QN = similarity_QN.sort(dim=1, descending=True, stable=True)
    hits_QN = _mask(positives, like=order_QN).gather(1, order_QN) & (sorted_QN > NOT_RETRIEVABLE)
    junk_QN = _mask(junk, like=order_QN).gather(1, order_QN)
    ranks_QN = (~junk_QN).cumsum(dim=1) - (~junk_QN).long()
    ap_Q = average_precision(hits_QN, ranks_QN, totals=[len(indices) for indices in positives])
    return Ranking(ap_Q, _precision(hits_QN, ranks_QN, ap_Q, at=at))


def average_precision(hits_QR: Tensor, ranks_QR: Tensor, *, totals: Sequence[int]) -> Tensor:
    """AP (Q,) float64 of retrieved images, best first; NaN for a query without positives.

    `hits_QR` marks the positives, `ranks_QR` are the ranks from 0, and `totals` are the numbers of all positives,
    retrieved or not.
    """
    before_QR = (hits_QR.cumsum(dim=1) - hits_QR.long()).double()
    left_QR = torch.where(ranks_QR > 0, before_QR / ranks_QR.clamp(min=1), 1.0)
    right_QR = (before_QR + 1) / (ranks_QR + 1)
    areas_Q = ((left_QR + right_QR) / 2 * hits_QR).sum(dim=1)
    return areas_Q / torch.tensor(totals, dtype=torch.float64, device=areas_Q.device)


def average_precision_at_top(neighbors_QR: Tensor, *, positives: Sequence[Sequence[int]]) -> Tensor:
    """AP (Q,) of Holidays and Copydays for the retrieved database indices, best first; others count as not found.

    NaN for a query without positives.
    """
    hits_QR = torch.zeros_like(neighbors_QR, dtype=torch.bool)
    for query, indices in enumerate(positives):
        wanted = torch.tensor(list(indices), dtype=torch.int64, device=neighbors_QR.device)
        hits_QR[query] = torch.isin(neighbors_QR[query], wanted)
    ranks_QR = torch.arange(neighbors_QR.shape[1], device=neighbors_QR.device).expand_as(neighbors_QR)
    return average_precision(hits_QR, ranks_QR, totals=[len(indices) for indices in positives])


def _precision(hits_QN: Tensor, ranks_QN: Tensor, ap_Q: Tensor, *, at: Sequence[int]) -> Tensor:
    last_Q = torch.where(hits_QN, ranks_QN + 1, 0).amax(dim=1)  # 0 without a hit
    columns = []
    for k in at:
        upto_Q = last_Q.clamp(max=k)
        count_Q = (hits_QN & (ranks_QN < upto_Q[:, None])).sum(dim=1)
        columns.append(count_Q.double() / upto_Q.clamp(min=1))
    precision_QK = torch.stack(columns, dim=1)
    return torch.where(ap_Q.isnan()[:, None], torch.nan, precision_QK)


def _mask(indices: Sequence[Sequence[int]], *, like: Tensor) -> Tensor:
    """True at the indices of each query."""
    mask_QN = torch.zeros_like(like, dtype=torch.bool)
    for mask_N, own in zip(mask_QN, indices, strict=True):
        mask_N[torch.tensor(list(own), dtype=torch.int64, device=like.device)] = True
    return mask_QN
