"""Batches in an order that can be left and found again.

A `PlacedLoader` is a sized loader with a place: Lightning keeps it in a checkpoint (`state_dict`), and a run that goes
on gets the batches that were left of its epoch, crops included.
"""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from dino_lightning.data.batches import Key, MultiCropDataset, MultiCropStream, WorkerError, WorkerLoader
from dino_lightning.data.shard_order import StreamPosition
from dino_lightning.errors import UserError
from dino_lightning.runtime.collectives import all_gather_concat


class EpochBatchSampler(Sampler[list[Key]]):
    """Batches of (epoch, index) of one rank, from batch `start` on; an incomplete last batch is left out.

    The order is that of PyTorch's `DistributedSampler`, as in the original.
    """

    def __init__(self, images: int, *, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        # It asks a data set for its length alone.
        self.sampler = DistributedSampler(range(images), world_size, rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.batch_size, self.start = batch_size, 0
        self.world_size = world_size

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, indices = self.sampler.epoch, torch.tensor(list(self.sampler))
        for batch in range(self.start, len(self)):
            own = indices[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(epoch, index) for index in own.tolist()]


class ResumableLoader:
    """Epochs of `len` batches; what map-style data and streams have in common."""

    def __init__(self, loader: DataLoader[Any], *, images_per_batch: int) -> None:
        self.loader = loader
        self.images_per_batch = images_per_batch
        """Images of one batch on all ranks."""
        self.epoch = self.done = 0
        """Epoch, and its batches that were handed out."""
        self.waited_s = 0.0
        """Seconds in which whoever asked for a batch waited for it, since the loader was built."""

    @property
    def _iterator(self) -> Any:
        """The running iterator: Lightning looks here for loader processes to end, when a run ends in any way.

        Left to Python's own end, they and the thread that pins memory are waited for seconds each.
        """
        return self.loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self.loader._iterator = iterator

    @property
    def sampler(self) -> "ResumableLoader":
        """What has `set_epoch`: Lightning looks here."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; Lightning calls it before each, also before the rest of one."""
        if epoch != self.epoch:
            self.epoch, self.done = epoch, 0

    def _timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        asked = time.perf_counter()
        for batch in batches:
            self.waited_s += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """The place, in plain numbers: on as many or other devices, and with any batch size."""
        return {"epoch": self.epoch, "images": self.done * self.images_per_batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.epoch, self.done = state["epoch"], state["images"] // self.images_per_batch


class MapLoader(ResumableLoader):
    """Batches of crops of images that are read by index."""

    def __init__(self, dataset: MultiCropDataset, order: EpochBatchSampler, **options: Any) -> None:
        loader = WorkerLoader(dataset, batch_sampler=order, collate_fn=_as_it_is, **loader_options(**options))
        super().__init__(loader, images_per_batch=order.batch_size * order.world_size)
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    # A generator: nothing is read before the first batch is asked for, when the epoch is known.
    def __iter__(self) -> Iterator[Any]:
        if self.done >= len(self):
            self.done = 0
        self.order.sampler.set_epoch(self.epoch)
        self.order.start = self.done
        for batch in self._timed(self.loader):
            self.done += 1
            yield raise_worker_error(batch)


class StreamLoader(ResumableLoader):
    """Batches of crops of a stream: an epoch is a number of images, and the stream goes on where the last one ended."""

    def __init__(self, dataset: MultiCropStream, **options: Any) -> None:
        loader = WorkerLoader(dataset, batch_size=None, **loader_options(**options))
        super().__init__(loader, images_per_batch=dataset.batch_size * dataset.world_size)
        self.dataset = dataset
        self.places: list[StreamPosition | None] = [None] * max(1, loader.num_workers)
        """Where each loader process stands, by its number."""
        self.turn = 0
        """The process that gives the next batch."""
        self._batches: Iterator[Any] | None = None

    def __len__(self) -> int:
        return self.dataset.stream.images // self.images_per_batch

    def __iter__(self) -> Iterator[Any]:
        if self.done >= len(self):
            self.done = 0
        if self._batches is None:
            self.dataset.places, self.dataset.first = self.places, self.turn
            self._batches = self._timed(self.loader)
        while self.done < len(self):
            batch, place = next(self._batches)
            batch = raise_worker_error(batch)
            self.places[self.turn] = place
            self.turn = (self.turn + 1) % len(self.places)
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The place of every loader process of every rank; all ranks call it."""
        unread = (-1,) * len(StreamPosition._fields)
        own = torch.tensor([tuple(place) if place else unread for place in self.places])
        everywhere: Tensor = all_gather_concat(own)
        order = {"seed": self.dataset.seed, "shuffle_buffer": self.dataset.shuffle_buffer}
        return {**super().state_dict(), **order, "turn": self.turn, "places": everywhere.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises `UserError` where the order of the stream would be another."""
        super().load_state_dict(state)
        for name, key in (("seed", "seed"), ("shuffle_buffer", "data.shuffle_buffer")):
            if state[name] != (now := getattr(self.dataset, name)):
                raise UserError(
                    f"resume=true: the stream was read with {key}={state[name]}, not {key}={now}; set it back."
                )
        workers, readers = len(self.places), len(self.places) * self.dataset.world_size
        if len(state["places"]) != readers:
            raise UserError(
                f"resume=true: the stream was read by {len(state['places'])} loader processes and would now be read by "
                f"{readers}; set devices and data.num_workers as they were."
            )
        first = self.dataset.rank * workers
        rows = state["places"][first : first + workers]
        self.places = [None if row[0] < 0 else StreamPosition(*row) for row in rows]
        self.turn, self._batches = state["turn"], None


def loader_options(*, num_workers: int, prefetch_batches: int, pin_memory: bool) -> dict[str, Any]:
    """Arguments of PyTorch's loader."""
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "prefetch_factor": prefetch_batches if num_workers else None,
        "pin_memory": pin_memory and torch.cuda.is_available(),
        # Without its own generator every iterator draws a seed from the global one.
        "generator": torch.Generator().manual_seed(0),
    }


def _as_it_is(batch: Any) -> Any:
    return batch


def raise_worker_error(batch: Any) -> Any:
    """Raise the error of a loader process here; return any other batch unchanged."""
    if isinstance(batch, WorkerError):
        raise UserError(batch.message)
    return batch
