"""Which samples of a stream a reader sees, in which order: for ever, and again from any place.

A reader is one loader process of one rank. In pass p the shards are permuted, alike for all readers, and dealt out: to
reader r of R goes every R-th shard from the r-th on. Where there are fewer shards than readers, several readers share
a shard and each takes every n-th row of it. So in each pass exactly one reader sees a sample. Readers go from pass to
pass on their own and may drift apart.

A reader mixes its samples in chunks, across its shards but not across passes. While a chunk is given out, the next one
is read, a sample for a sample, so that there is no halt between them; only the last chunk of a pass may be too
short for that.
"""

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import numpy as np

from dino_lightning.data.sources.base import ImageStream, Sample
from dino_lightning.errors import UserError

EMPTY_PASSES = 10
"""Passes in a row without a sample after which a reader gives up. A single one can be bad luck: an empty shard."""


class StreamPosition(NamedTuple):
    """How far a reader has come. `tuple(place)` goes into a checkpoint, `Place(*numbers)` comes back from it.

    It holds for the same stream, seed, number of readers and `shuffle_buffer` only.
    """

    turn: int = 0
    """Pass over all shards."""
    position: int = 0
    """Where the chunk begins: position in the reader's shards of the pass."""
    row: int = 0
    """Where the chunk begins: row of that shard."""
    chunk: int = 0
    """Number of the chunk in the pass."""
    emitted: int = 0
    """Samples of the chunk that were given out."""


class _Read(NamedTuple):
    """A sample as it comes from its shard."""

    sample: Sample
    key: tuple[int, int, int]
    """Pass, shard, row."""
    start: StreamPosition
    """The place from which this sample is the next one, where it is the first of its chunk."""


Read = tuple[Sample, tuple[int, int, int], StreamPosition]
"""The sample; its pass, shard and row, from which its crops are seeded; the place to go on from after it."""


def read_stream(
    stream: ImageStream,
    *,
    seed: int,
    reader: int,
    readers: int,
    shuffle_buffer: int,
    start: StreamPosition | None = None,
) -> Iterator[Read]:
    """The samples of `reader` (from 0) of `readers`, without end, in chunks of `shuffle_buffer`; 1 or less: as stored.

    From `start` on the order is the one that follows it without an interruption. Raises `UserError` where the reader
    gets no sample at all.
    """
    start = start or StreamPosition()
    chunks = _chunks(stream, seed=seed, reader=reader, readers=readers, size=max(shuffle_buffer, 1), start=start)
    chunk: list[_Read | None] = [*iter(lambda: next(chunks), None)]
    emitted = start.emitted
    while chunk[0] is not None:
        following, complete = [], False
        begin = chunk[0].start
        # numpy takes [seed, turn] for [seed, turn, 0, 0]: `reader + 1` keeps this from the generator of the shards.
        order = np.random.default_rng([seed, begin.turn, reader + 1, begin.chunk]).permutation(len(chunk))
        for number, index in enumerate(order.tolist()):
            if not complete:
                complete = _take(chunks, into=following)
            read, chunk[index] = chunk[index], None  # its memory goes to the next chunk
            if read is not None and number >= emitted:
                yield read.sample, read.key, begin._replace(emitted=number + 1)
        while not complete:
            complete = _take(chunks, into=following)
        chunk, emitted = following, 0


def shards_of_reader(*, shards: int, seed: int, turn: int, reader: int, readers: int) -> tuple[list[int], int, int]:
    """The reader's shards in pass `turn`, the number of readers that share them, and its position among those."""
    order = np.random.default_rng([seed, turn]).permutation(shards).tolist()
    if shards >= readers:
        return order[reader::readers], 1, 0
    if shards == 0:
        return [], 1, 0
    slot = reader % shards
    return [order[slot]], len(range(slot, readers, shards)), reader // shards


def _take(chunks: Iterator[_Read | None], *, into: list[_Read | None]) -> bool:
    """Read one more sample; True at the end of the chunk."""
    read = next(chunks)
    if read is not None:
        into.append(read)
    return read is None


def _chunks(
    stream: ImageStream, *, seed: int, reader: int, readers: int, size: int, start: StreamPosition
) -> Iterator[_Read | None]:
    """The reader's samples in stored order, with None after the last one of each chunk (never of none)."""
    empty = 0
    for turn in count(start.turn):
        owned, sharers, part = shards_of_reader(
            shards=stream.shards, seed=seed, turn=turn, reader=reader, readers=readers
        )
        taken, first, chunk = 0, start.row, start.chunk
        for position in range(start.position, len(owned)):
            samples = stream.read_shard(owned[position], start=first)
            for row, sample in enumerate(samples, start=first):
                if row % sharers == part:
                    taken += 1
                    yield _Read(sample, (turn, owned[position], row), StreamPosition(turn, position, row, chunk))
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
                "give fewer data.num_workers or more images"
            )
