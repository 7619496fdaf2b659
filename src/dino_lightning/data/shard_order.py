"""The endless, resumable order in which readers read the samples of a stream.

A reader is one loader process of one rank. In pass p the shards are permuted, identically in all readers, and assigned:
reader r of R gets every R-th shard from the r-th on. With fewer shards than readers, several readers share a shard and
each takes every n-th row of it. So exactly one reader reads a sample in each pass. Readers start their passes
independently and may drift apart.

A reader shuffles its samples in chunks, across its shards but not across passes. While the samples of a chunk are
emitted, the next chunk is read, one sample for each emitted one, so that there is no pause between them; only the last
chunk of a pass may be too short for that.
"""

from collections.abc import Iterator
from itertools import chain, count, islice
from typing import NamedTuple

import numpy as np

from dino_lightning.data.sources.base import ImageStream, Sample
from dino_lightning.errors import UserError

EMPTY_PASSES = 10
"""Passes in a row without a sample after which a reader raises an error; a single one can be an empty shard."""


class StreamPosition(NamedTuple):
    """The position of a reader, which a checkpoint stores as a tuple.

    It is valid only for the same stream, seed, number of readers and `shuffle_buffer`.
    """

    epoch: int = 0
    """Pass over all shards."""
    position: int = 0
    """Start of the chunk: position among the reader's shards of the pass."""
    row: int = 0
    """Start of the chunk: row in that shard."""
    chunk: int = 0
    """Number of the chunk in the pass."""
    emitted: int = 0
    """Samples of the chunk that were emitted."""


class StreamSample(NamedTuple):
    """A sample and its position."""

    sample: Sample
    key: tuple[int, int, int]
    """Pass, shard and row, which seed its crops."""
    position: StreamPosition
    """As `read_stream` yields it, the position after the sample; in a chunk, the start of the chunk."""


def read_stream(
    stream: ImageStream,
    *,
    seed: int,
    reader: int,
    readers: int,
    shuffle_buffer: int,
    start: StreamPosition | None = None,
) -> Iterator[StreamSample]:
    """The endless samples of `reader` (from 0) of `readers`, in chunks of `shuffle_buffer` (1 or less: stored order).

    From `start` on the order is the same as without an interruption. Raises `UserError` if the reader gets no samples.
    """
    start = start or StreamPosition()
    samples = _chunks(stream, seed=seed, reader=reader, readers=readers, size=max(shuffle_buffer, 1), start=start)
    chunk, emitted = dict(enumerate(_rest_of_chunk(samples))), start.emitted
    while True:
        following, next_chunk = _rest_of_chunk(samples), []
        chunk_start = chunk[0].position
        # numpy treats [seed, epoch] like [seed, epoch, 0, 0]; `reader + 1` avoids the generator of the shards.
        rng = np.random.default_rng([seed, chunk_start.epoch, reader + 1, chunk_start.chunk])
        for number, index in enumerate(rng.permutation(len(chunk)).tolist()):
            next_chunk += islice(following, 1)
            sample = chunk.pop(index)  # frees the memory for the next chunk
            if number >= emitted:
                yield sample._replace(position=chunk_start._replace(emitted=number + 1))
        chunk, emitted = dict(enumerate(chain(next_chunk, following))), 0


def shards_of_reader(*, shards: int, seed: int, epoch: int, reader: int, readers: int) -> tuple[list[int], int, int]:
    """The reader's shards in a pass, the number of readers that share them, and its index among those."""
    order = np.random.default_rng([seed, epoch]).permutation(shards).tolist()
    if shards >= readers:
        return order[reader::readers], 1, 0
    if shards == 0:
        return [], 1, 0
    slot = reader % shards
    return [order[slot]], len(range(slot, readers, shards)), reader // shards


def _rest_of_chunk(samples: Iterator[StreamSample | None]) -> Iterator[StreamSample]:
    return iter(lambda: next(samples), None)


def _chunks(
    stream: ImageStream, *, seed: int, reader: int, readers: int, size: int, start: StreamPosition
) -> Iterator[StreamSample | None]:
    """The reader's samples in stored order, with None after the last one of each chunk; chunks are never empty."""
    empty = 0
    for epoch in count(start.epoch):
        shards, sharers, part = shards_of_reader(
            shards=stream.shards, seed=seed, epoch=epoch, reader=reader, readers=readers
        )
        taken, first, chunk = 0, start.row, start.chunk
        for position in range(start.position, len(shards)):
            samples = stream.read_shard(shards[position], start=first)
            for row, sample in enumerate(samples, start=first):
                if row % sharers == part:
                    taken += 1
                    key = (epoch, shards[position], row)
                    yield StreamSample(sample, key, StreamPosition(epoch, position, row, chunk))
                    if taken % size == 0:
                        chunk += 1
                        yield None
            first = 0
        if taken % size:
            yield None
        start = StreamPosition()
        empty = 0 if taken else empty + 1
        if empty == EMPTY_PASSES:
            raise UserError(
                f"data: loader process {reader + 1} of {readers} gets no image from {stream.shards} shards; "
                "reduce data.num_workers, or use more images"
            )
