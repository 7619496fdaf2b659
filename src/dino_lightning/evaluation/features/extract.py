"""Features of a whole dataset; the ranks share the work and see each image once.

    indices = subset_indices(len(dataset), limit=10_000, seed=0)
    shard = extract_features(backbone, dataset, indices=indices, batch_size=256, num_workers=4, device=device)
    features, labels, indices = gather_by_index(*shard)

The global random state and the train / eval mode of modules do not change, so an evaluation during training does not
affect the training.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dino_lightning.evaluation.features.images import BatchLoader
from dino_lightning.runtime.collectives import all_gather_concat, rank, world_size

GATHER_ROWS = 16_384
"""Images per rank and collective in `gather_by_index`: limits the GPU memory that NCCL needs."""


def subset_indices(n: int, *, limit: int | None, seed: int) -> list[int]:
    """A random subset of `limit` of the numbers 0 ... n - 1, ascending; all of them if `limit` is None or above n.

    The subset depends only on `seed`, so all ranks draw the same.
    """
    if limit is None or limit >= n:
        return list(range(n))
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:limit]
    return sorted(drawn.tolist())


def evenly_spaced(n: int, count: int) -> list[int]:
    """`count` of the numbers 0 ... n - 1, including the first and the last; all of them if there are fewer."""
    return np.linspace(0, n - 1, min(count, n)).round().astype(int).tolist()


def labeled_subset(labels_N: np.ndarray, *, limit: int | None, seed: int) -> list[int]:
    """Indices of `limit` random labeled images (label 0 or above), ascending: the bank of k-NN."""
    labeled = np.flatnonzero(labels_N >= 0)
    return [int(labeled[i]) for i in subset_indices(len(labeled), limit=limit, seed=seed)]


def spread_over_classes(labels_N: np.ndarray | None, n: int, *, seed: int) -> np.ndarray:
    """The numbers 0 ... n - 1 in an order drawn by seed; with labels, one of each class before a second of any."""
    order = np.random.default_rng(seed).permutation(n)
    if labels_N is None:
        return order
    counts, rounds = Counter[int](), []
    for label in labels_N[order].tolist():
        rounds.append(counts[label])
        counts[label] += 1
    return order[np.argsort(rounds, kind="stable")]


def extract_features(
    forward: Callable[[Tensor], Tensor],
    dataset: Dataset,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    indices: Sequence[int] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's features (n, D) float32, labels (n,) int64 and indices (n,) int64, all on the CPU.

    `dataset[i]` is an image (C, H, W) and a label. Rank r of R processes `indices[r::R]` (default: all images); indices
    must not repeat. A rank without images returns features of shape (0, D). `batch_size` is per device. `on_batch` is
    called with the number of images of each finished batch. The caller sets train / eval mode.
    """
    selected = range(len(dataset)) if indices is None else indices  # pyright: ignore[reportArgumentType]
    local = [int(i) for i in selected[rank() :: world_size()]]
    batches = [local[start : start + batch_size] for start in range(0, len(local), batch_size)]

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        for part in extract_batches(forward, dataset, batches=batches, num_workers=num_workers, device=device):
            yield part
            if on_batch is not None:
                on_batch(len(part[1]))

    return *join_parts(parts(), n=len(local)), torch.tensor(local, dtype=torch.int64)


def extract_batches(
    forward: Callable[[Tensor], Tensor],
    dataset: Dataset,
    *,
    batches: Sequence[Sequence[int]],
    num_workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features (B, D) float32 and labels (B,) int64 of each batch of indices, in order, on the CPU."""
    for images_BCHW, labels_B in BatchLoader(dataset, batches, num_workers=num_workers, device=device):
        # Not inference_mode: a backbone may cache a tensor of its forward pass, and training cannot use an inference
        # tensor.
        with torch.no_grad():
            features_BD = forward(images_BCHW.to(device, non_blocking=True))
        assert features_BD.ndim == 2, f"features of shape {tuple(features_BD.shape)}, not (B, D)"
        yield features_BD.detach().float().cpu(), labels_B


def join_parts(parts: Iterable[tuple[Tensor, Tensor]], *, n: int) -> tuple[Tensor, Tensor]:
    """The n features and labels of this rank from their parts, each of which can be freed when the next one is taken.

    The features are (0, D) on a rank without images, which learns D from the others.
    """
    features_ND, labels_N, done = torch.empty(0, 0), torch.empty(n, dtype=torch.int64), 0
    for features_BD, labels_B in parts:
        if not done:
            features_ND = torch.empty(n, features_BD.shape[1])
        rows = slice(done, done + len(labels_B))
        features_ND[rows], labels_N[rows] = features_BD, labels_B
        done = rows.stop
    width = int(all_gather_concat(torch.tensor([features_ND.shape[1]])).max())
    return features_ND.reshape(n, width), labels_N


def gather_by_index(features_ND: Tensor, labels_N: Tensor, indices_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The features, labels and indices of all ranks, on every rank, by ascending index.

    Needs 4 M D bytes of memory per rank for M images, in addition to the rank's own features.
    """
    indices_M, order = all_gather_concat(indices_N).sort()
    assert (indices_M.diff() > 0).all(), "an image occurs twice"
    labels_M = all_gather_concat(labels_N)[order]
    features_MD = features_ND.new_empty(len(indices_M), features_ND.shape[1])
    longest = int(all_gather_concat(torch.tensor([len(indices_N)])).max())
    for start in range(0, longest, GATHER_ROWS):
        rows = slice(start, start + GATHER_ROWS)
        positions = torch.searchsorted(indices_M, all_gather_concat(indices_N[rows]))
        features_MD[positions] = all_gather_concat(features_ND[rows])
    return features_MD, labels_M, indices_M
