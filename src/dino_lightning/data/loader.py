"""Loaders that resume in the middle of an epoch.

Lightning saves the position of a `ResumableLoader` in checkpoints (`state_dict`), and a resumed run gets the remaining
batches of its epoch with the same crops.
"""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from dino_lightning.config import DataConfig
from dino_lightning.data.batches import Key, MultiCropDataset, MultiCropStream, WorkerError, WorkerLoader
from dino_lightning.data.parallel import identity
from dino_lightning.data.shard_order import StreamPosition
from dino_lightning.errors import UserError
from dino_lightning.runtime.collectives import all_gather_concat


class EpochBatchSampler(Sampler[list[Key]]):
    """Batches of (epoch, index) of one rank, from batch `start` on, without an incomplete last batch.

    The order is that of PyTorch's `DistributedSampler`, like in the original DINO.
    """

    def __init__(self, images: int, *, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        # The sampler uses only the length of its dataset.
        self.sampler = DistributedSampler(range(images), world_size, rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.batch_size, self.start = batch_size, 0
        self.world_size = world_size

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, indices = self.sampler.epoch, torch.tensor(list(self.sampler))
        for batch in range(self.start, len(self)):
            yield [(epoch, i) for i in indices[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()]


class ResumableLoader:
    """Base of the loaders: epochs of `len` batches, and the position in the current epoch."""

    def __init__(self, loader: DataLoader[Any], *, images_per_batch: int) -> None:
        self.loader = loader
        self.images_per_batch = images_per_batch
        """Images of one batch on all ranks."""
        self.epoch = self.done = 0
        """The epoch, and the number of its batches that were yielded."""
        self.waited_s = 0.0
        """Time that the training has waited for batches since the loader was created."""

    @property
    def _iterator(self) -> Any:
        """The active iterator. Lightning reads this attribute to stop loader processes when a run ends.

        Otherwise Python would wait several seconds each for them and for the thread that pins memory.
        """
        return self.loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self.loader._iterator = iterator

    @property
    def sampler(self) -> "ResumableLoader":
        """The object on which Lightning calls `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch; Lightning calls it before each one, also before it resumes one."""
        if epoch != self.epoch:
            self.epoch, self.done = epoch, 0

    def _timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        start = time.perf_counter()
        for batch in batches:
            self.waited_s += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """The position, valid for any number of devices and any batch size."""
        return {"epoch": self.epoch, "images": self.done * self.images_per_batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at this position."""
        self.epoch, self.done = state["epoch"], state["images"] // self.images_per_batch


class MapLoader(ResumableLoader):
    """Batches of crops of a source with random access."""

    def __init__(self, dataset: MultiCropDataset, order: EpochBatchSampler, **options: Any) -> None:
        loader = WorkerLoader(dataset, batch_sampler=order, collate_fn=identity, **options)
        super().__init__(loader, images_per_batch=order.batch_size * order.world_size)
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    # A generator, so that nothing is read before the first batch is requested, when the epoch is known.
    def __iter__(self) -> Iterator[Any]:
        if self.done >= len(self):
            self.done = 0
        self.order.sampler.set_epoch(self.epoch)
        self.order.start = self.done
        for batch in self._timed(self.loader):
            self.done += 1
            yield raise_worker_error(batch)


class StreamLoader(ResumableLoader):
    """Batches of crops of a stream: an epoch is a number of images, and the next one continues the stream."""

    def __init__(self, dataset: MultiCropStream, **options: Any) -> None:
        loader = WorkerLoader(dataset, batch_size=None, **options)
        super().__init__(loader, images_per_batch=dataset.batch_size * dataset.world_size)
        self.dataset = dataset
        self.positions: list[StreamPosition | None] = [None] * max(1, loader.num_workers)
        """Position of each loader process."""
        self.next_worker = 0
        """The process that provides the next batch."""
        self._batches: Iterator[Any] | None = None

    def __len__(self) -> int:
        return self.dataset.stream.images // self.images_per_batch

    def __iter__(self) -> Iterator[Any]:
        if self.done >= len(self):
            self.done = 0
        if self._batches is None:
            self.dataset.positions, self.dataset.first_worker = self.positions, self.next_worker
            self._batches = self._timed(self.loader)
        while self.done < len(self):
            batch, position = next(self._batches)
            batch = raise_worker_error(batch)
            self.positions[self.next_worker] = position
            self.next_worker = (self.next_worker + 1) % len(self.positions)
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The positions of all loader processes of all ranks; all ranks call it."""
        unread = (-1,) * len(StreamPosition._fields)
        local = torch.tensor([tuple(position) if position else unread for position in self.positions])
        positions: Tensor = all_gather_concat(local)
        order = {"seed": self.dataset.seed, "shuffle_buffer": self.dataset.shuffle_buffer}
        return {**super().state_dict(), **order, "next_worker": self.next_worker, "positions": positions.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at this position. Raises `UserError` if the order of the stream would change."""
        super().load_state_dict(state)
        for name, key in (("seed", "seed"), ("shuffle_buffer", "data.shuffle_buffer")):
            if state[name] != (current := getattr(self.dataset, name)):
                raise UserError(
                    f"resume=true: the checkpoint was written with {key}={state[name]}, but the run has "
                    f"{key}={current}; set {key}={state[name]} to resume."
                )
        workers, readers = len(self.positions), len(self.positions) * self.dataset.world_size
        if len(state["positions"]) != readers:
            raise UserError(
                f"resume=true: the checkpoint was written with {len(state['positions'])} loader processes, but the run "
                f"has {readers}; restore the number of devices and data.num_workers."
            )
        first = self.dataset.rank * workers
        local = state["positions"][first : first + workers]
        self.positions = [None if numbers[0] < 0 else StreamPosition(*numbers) for numbers in local]
        self.next_worker, self._batches = state["next_worker"], None


def loader_options(config: DataConfig) -> dict[str, Any]:
    """Arguments of PyTorch's loader."""
    return {
        "num_workers": config.num_workers,
        "persistent_workers": config.num_workers > 0,
        "prefetch_factor": config.prefetch_batches if config.num_workers else None,
        "pin_memory": config.pin_memory and torch.cuda.is_available(),
    }


def raise_worker_error(batch: Any) -> Any:
    """Raise the error of a loader process; return any other batch unchanged."""
    if isinstance(batch, WorkerError):
        raise UserError(batch.message)
    return batch
