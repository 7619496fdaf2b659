"""Features of a whole data set, each image once, shared by all ranks.

    indices = subset_indices(len(dataset), limit=10_000, seed=0)
    shard = extract_features(backbone, dataset, indices=indices, batch_size=256, num_workers=4, device=device)
    features, labels, indices = gather_by_index(*shard)

Nothing here touches a global random state or a module's train / eval mode: an evaluation in the middle of training
leaves the training as it was.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dino_lightning.data.batches import WorkerError, WorkerLoader
from dino_lightning.errors import UserError
from dino_lightning.runtime.collectives import all_gather_concat, rank, world_size

GATHER_ROWS = 16_384
"""Rows per rank and collective in `gather_by_index`: bounds what passes through GPU memory under NCCL."""


def subset_indices(n: int, *, limit: int | None, seed: int) -> list[int]:
    """`limit` of the numbers 0 ... n - 1 in rising order, each equally likely; all where `limit` is None or above n.

    The same on every rank.
    """
    if limit is None or limit >= n:
        return list(range(n))
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:limit]
    return sorted(drawn.tolist())


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

    `dataset[i]` is an image (C, H, W) and a label. Rank r of R takes `indices[r::R]` (of all images by default), which
    must not repeat: together the ranks see each image once. A rank without images returns (0, D). `batch_size` is per
    device, `on_batch` hears the number of images of each finished batch, and train / eval mode is the caller's matter.
    """
    chosen = range(len(dataset)) if indices is None else indices  # pyright: ignore[reportArgumentType]
    own = [int(i) for i in chosen[rank() :: world_size()]]
    features_ND = torch.empty(0, 0)
    labels_N = torch.empty(len(own), dtype=torch.int64)
    done = 0
    batches = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    for features_BD, labels_B in features_of_batches(
        forward, dataset, batches=batches, num_workers=num_workers, device=device
    ):
        if done == 0:
            features_ND = torch.empty(len(own), features_BD.shape[1])
        rows = slice(done, done + len(labels_B))
        features_ND[rows], labels_N[rows] = features_BD, labels_B
        done += len(labels_B)
        if on_batch is not None:
            on_batch(len(labels_B))
    return with_common_width(features_ND), labels_N, torch.tensor(own, dtype=torch.int64)


def features_of_batches(
    forward: Callable[[Tensor], Tensor],
    dataset: Dataset,
    *,
    batches: Sequence[Sequence[int]],
    num_workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features (B, D) float32 and labels (B,) int64 of each batch of indices in turn, on the CPU.

    Raises the `UserError` of a loader process as it was.
    """
    for batch in _loader(dataset, batches=batches, workers=num_workers, on=device):
        if isinstance(batch, WorkerError):
            raise UserError(batch.message)
        images_B3HW, labels_B = batch
        # Not inference_mode: a backbone may cache a tensor of its forward pass, and training cannot use an inference
        # tensor.
        with torch.no_grad():
            features_BD = forward(images_B3HW.to(device, non_blocking=True))
        assert features_BD.ndim == 2, f"features of shape {tuple(features_BD.shape)}, not (B, D)"
        yield features_BD.detach().float().cpu(), labels_B


def with_common_width(features_ND: Tensor) -> Tensor:
    """The features of a rank, which learns D from the others where it has no images, and gets (0, D)."""
    width = int(all_gather_concat(torch.tensor([features_ND.shape[1]])).max())
    return features_ND.reshape(len(features_ND), width)


def gather_by_index(features_ND: Tensor, labels_N: Tensor, indices_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All ranks' features, labels and indices, on every rank and in rising order of the index.

    Takes 4 M D bytes of memory per rank for M images in all, besides the shard.
    """
    indices_M, order = all_gather_concat(indices_N).sort()
    assert (indices_M.diff() > 0).all(), "an image stands in the set twice"
    labels_M = all_gather_concat(labels_N)[order]
    features_MD = features_ND.new_empty(len(indices_M), features_ND.shape[1])
    most = int(all_gather_concat(torch.tensor([len(indices_N)])).max())
    for start in range(0, most, GATHER_ROWS):
        rows = slice(start, start + GATHER_ROWS)
        places = torch.searchsorted(indices_M, all_gather_concat(indices_N[rows]))
        features_MD[places] = all_gather_concat(features_ND[rows])
    return features_MD, labels_M, indices_M


class _Images(Dataset[Any]):
    """A data set whose `UserError` comes back as a value."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: list[int]) -> list[Any] | WorkerError:
        """PyTorch's loader hands over all indices of a batch at once."""
        try:
            return [self.dataset[index] for index in indices]
        except UserError as error:
            return WorkerError(str(error))


def _collated(samples: list[Any] | WorkerError) -> Any:
    return samples if isinstance(samples, WorkerError) else default_collate(samples)


def _loader(dataset: Dataset, *, batches: Sequence[Sequence[int]], workers: int, on: torch.device) -> DataLoader:
    return WorkerLoader(
        _Images(dataset),
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=_collated,
        num_workers=min(workers, len(batches)),
        pin_memory=on.type == "cuda",
        # Without its own generator every iterator draws a seed from the global one.
        generator=torch.Generator().manual_seed(0),
    )
