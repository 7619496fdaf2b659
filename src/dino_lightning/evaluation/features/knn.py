"""Weighted k-NN classification, the paper's first evaluation (section 4.1; the protocol of Wu et al., 2018).

The k bank images whose features have the largest cosine similarity to those of a query vote for its class:

    votes(c) = sum over neighbors i of class c of exp(similarity_i / temperature)

Two rules make the result depend only on the features: among equal similarities the lower bank index is nearer, and
among equal votes the lower class wins. A query whose similarities are not finite (after a divergence) counts as wrong.
N bank images, M queries, D width, C classes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_lightning.runtime.collectives import all_reduce_sum

LAST = torch.iinfo(torch.int64).max
"""The rank of a class that is never among the first ones."""


@torch.no_grad()
def knn_accuracy(
    bank_ND: Tensor,
    bank_labels_N: Tensor,
    queries_MD: Tensor,
    query_labels_M: Tensor,
    *,
    k: Sequence[int],
    temperature: float,
    num_classes: int,
    topk: Sequence[int] = (1, 5),
    device: torch.device,
    bank_chunk: int = 8192,
    query_chunk: int = 1024,
) -> dict[int, dict[str, float]]:
    """Accuracy in percent for each k: `{20: {"top1": 74.5, "top5": 89.3}, ...}`.

    Every rank has the whole bank and its part of the queries, possibly none; counts are summed over ranks. A k above N
    is reduced to N. Top-j uses at most min(k, C) classes, as in the original. `device` finds the neighbors (see
    `nearest_neighbors` for its memory); votes are counted on the CPU, where the order of a sum is fixed.
    """
    similarity_MK, neighbors_MK = nearest_neighbors(
        bank_ND, queries_MD, k=max(k), device=device, bank_chunk=bank_chunk, query_chunk=query_chunk
    )
    return vote_accuracy(
        similarity_MK,
        neighbors_MK,
        bank_labels_N,
        query_labels_M,
        k=k,
        temperature=temperature,
        num_classes=num_classes,
        topk=topk,
        query_chunk=query_chunk,
    )


def vote_accuracy(
    similarity_MK: Tensor,
    neighbors_MK: Tensor,
    bank_labels_N: Tensor,
    query_labels_M: Tensor,
    *,
    k: Sequence[int],
    temperature: float,
    num_classes: int,
    topk: Sequence[int] = (1, 5),
    query_chunk: int = 1024,
) -> dict[int, dict[str, float]]:
    """The result of `knn_accuracy` for given neighbors, so that one search serves several temperatures."""
    for labels in (bank_labels_N, query_labels_M):
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(f"labels {labels.min()} ... {labels.max()} are outside 0 ... {num_classes - 1}")
    classes_N, targets_M = bank_labels_N.cpu(), query_labels_M.cpu()
    effective_k = [min(n, len(classes_N)) for n in k]
    counts = torch.zeros(len(k), len(topk), dtype=torch.int64)
    for rows in torch.arange(len(targets_M)).split(query_chunk):
        ranks = _target_ranks(
            similarity_MK[rows],
            classes_N[neighbors_MK[rows]],
            targets_M[rows],
            k=sorted(set(effective_k)),
            temperature=temperature,
            num_classes=num_classes,
        )
        counts += torch.tensor([[int((ranks[n] < min(j, n)).sum()) for j in topk] for n in effective_k])
    counts, total = all_reduce_sum(counts), int(all_reduce_sum(torch.tensor(len(targets_M))))
    if total == 0:
        raise ValueError("k-NN needs at least one query")
    return {
        n: {f"top{j}": 100 * int(count) / total for j, count in zip(topk, row, strict=True)}
        for n, row in zip(k, counts, strict=True)
    }


@torch.no_grad()
def nearest_neighbors(
    bank_ND: Tensor,
    queries_MD: Tensor,
    *,
    k: int,
    device: torch.device,
    bank_chunk: int = 8192,
    query_chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """The k nearest bank images of each query, nearest first: cosine similarities and indices, both (M, min(k, N)).

    Both are on the CPU. The bank passes through `device` once, in chunks. The peak memory of the device is about
    24 bytes x bank_chunk x query_chunk (200 MB by default) + 8 bytes x M x k + 4 D bytes per query and image of a
    chunk; it does not depend on N.
    """
    if not len(bank_ND):
        raise ValueError("k-NN needs at least one image in the bank")
    k = min(k, len(bank_ND))
    with exact_matmul(device):
        queries_MD = F.normalize(queries_MD.to(device).float(), dim=1)
        best_MK = torch.empty(len(queries_MD), 0, dtype=torch.int64, device=device)
        for start in range(0, len(bank_ND), bank_chunk):
            chunk_BD = F.normalize(bank_ND[start : start + bank_chunk].to(device).float(), dim=1)
            merged = []
            for queries_QD, best_QK in zip(queries_MD.split(query_chunk), best_MK.split(query_chunk), strict=True):
                keys_QB = _pack(queries_QD @ chunk_BD.T, first=start)
                new_QK = keys_QB.topk(min(k, len(chunk_BD)), dim=1).values
                candidates = torch.cat([best_QK, new_QK], dim=1)
                merged.append(candidates.topk(min(k, candidates.shape[1]), dim=1).values)
            best_MK = torch.cat(merged)
    return _unpack(best_MK.cpu())


# A neighbor is one integer: the similarity in the upper 32 bits and the bank index, counted downwards, in the lower.
# No two are equal, so `topk` has no ties to break, and the result does not depend on device or chunk size.
_LOW = 0xFFFFFFFF


def _ordered(bits: Tensor) -> Tensor:
    """Map the bits of a float32, read as int32, to an int32 of the same order, and back: its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _pack(similarity_QB: Tensor, *, first: int) -> Tensor:
    # Adding 0 turns -0.0 into 0.0: equal floats need equal bits.
    keys_QB = _ordered((similarity_QB + 0.0).view(torch.int32)).long()
    countdown_B = _LOW - torch.arange(first, first + keys_QB.shape[1], device=keys_QB.device)
    return keys_QB.bitwise_left_shift_(32).bitwise_or_(countdown_B)


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    similarity = _ordered((keys >> 32).int()).view(torch.float32)
    return similarity, _LOW - (keys & _LOW)


def _target_ranks(
    similarity_QK: Tensor,
    classes_QK: Tensor,
    targets_Q: Tensor,
    *,
    k: Sequence[int],
    temperature: float,
    num_classes: int,
) -> dict[int, Tensor]:
    """For each k (ascending), how many classes are ranked before the true one: (Q,), 0 for a correct query."""
    # Dividing the votes of a query by the largest weight keeps the ranking and avoids overflow at low temperatures.
    similarity_QK = similarity_QK.double()
    weights_QK = ((similarity_QK - similarity_QK[:, :1]) / temperature).exp()
    votes_QC = torch.zeros(len(targets_Q), num_classes, dtype=torch.float64)
    earlier_QC = torch.arange(num_classes) < targets_Q[:, None]
    ranks, counted = {}, 0
    for n in k:
        votes_QC.scatter_add_(1, classes_QK[:, counted:n], weights_QK[:, counted:n])
        target_Q1 = votes_QC.gather(1, targets_Q[:, None])
        ahead_QC = (votes_QC > target_Q1) | ((votes_QC == target_Q1) & earlier_QC)
        finite_Q = votes_QC.isfinite().all(dim=1)
        ranks[n], counted = torch.where(finite_Q, ahead_QC.sum(dim=1), LAST), n
    return ranks


@contextmanager
def exact_matmul(device: torch.device) -> Iterator[None]:
    """Full float32 products, without autocast or TF32, whose error of 1e-3 changes a vote by 1.4 % at T = 0.07."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
