"""The order in which readers see a stream, against a slow loop that writes out a whole pass."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch

from dino_lightning.data.shard_order import StreamPosition, read_stream
from dino_lightning.data.sources import ImageStream
from dino_lightning.data.sources.base import Sample
from dino_lightning.errors import UserError

SIZES = [(3,), (7, 7), (2, 0, 5), (1, 4, 2, 3, 2), (0, 1, 0, 12), (5, 5, 5, 5, 5, 5, 5)]


class Rows:
    """A stream whose samples are named by shard and row, and which counts what is read of it."""

    classes = None

    def __init__(self, *sizes: int):
        self.sizes, self.shards, self.images = sizes, len(sizes), sum(sizes)
        self.read = 0

    def read_shard(self, shard: int, *, start: int = 0) -> Iterator[Sample]:
        for row in range(start, self.sizes[shard]):
            self.read += 1
            yield Sample(b"", -1, f"{shard}/{row}")

    def all(self) -> list[tuple[int, int]]:
        return [(shard, row) for shard, size in enumerate(self.sizes) for row in range(size)]


def oracle(sizes: tuple[int, ...], *, seed: int, turn: int, reader: int, readers: int, size: int) -> list[tuple]:
    """(pass, shard, row) of a reader's pass, every rule of the module's text written out for all readers."""
    shards = [int(shard) for shard in np.random.default_rng([seed, turn]).permutation(len(sizes))]
    hands: list[list[tuple]] = [[] for _ in range(readers)]
    if len(shards) >= readers:
        for place, shard in enumerate(shards):
            hands[place % readers] += [(turn, shard, row) for row in range(sizes[shard])]
    else:
        for place, shard in enumerate(shards):
            sharers = [r for r in range(readers) if r % len(shards) == place]
            for row in range(sizes[shard]):
                hands[sharers[row % len(sharers)]].append((turn, shard, row))
    mixed = []
    for number, begin in enumerate(range(0, len(hands[reader]), size)):
        chunk = hands[reader][begin : begin + size]
        mixed += [chunk[i] for i in np.random.default_rng([seed, turn, reader + 1, number]).permutation(len(chunk))]
    return mixed


def keys(*sizes: int, count: int, seed: int = 5, reader: int = 0, readers: int = 1, size: int = 4) -> list[tuple]:
    reading = read_stream(Rows(*sizes), seed=seed, reader=reader, readers=readers, shuffle_buffer=size)
    return [key for _, key, _ in islice(reading, count)]


def test_rows_is_a_stream():
    assert isinstance(Rows(1), ImageStream)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("readers", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_order_equals_the_oracle(sizes, readers, size):
    for turn_of_all in range(2):
        passes = [
            oracle(sizes, seed=5, turn=turn_of_all, reader=reader, readers=readers, size=size)
            for reader in range(readers)
        ]
        seen = [key[1:] for hand in passes for key in hand]
        assert sorted(seen) == Rows(*sizes).all()
    for reader in range(readers):
        wanted = [
            key
            for turn in range(9)
            for key in oracle(sizes, seed=5, turn=turn, reader=reader, readers=readers, size=size)
        ]
        if wanted:
            assert keys(*sizes, count=len(wanted), reader=reader, readers=readers, size=size) == wanted


def test_key_names_the_sample():
    for sample, (_, shard, row), _ in islice(
        read_stream(Rows(4, 3), seed=0, reader=0, readers=1, shuffle_buffer=5), 30
    ):
        assert sample.name == f"{shard}/{row}"


def test_order_differs_by_pass_and_seed_and_repeats():
    sizes = (9, 8, 7)
    first = keys(*sizes, count=48)
    assert first == keys(*sizes, count=48)
    assert first[:24] != keys(*sizes, count=24, seed=6)
    assert [key[1:] for key in first[:24]] != [key[1:] for key in first[24:]]
    assert {key[0] for key in first[:24]} == {0}


@pytest.mark.parametrize("size", [0, 1])
def test_without_a_buffer_rows_are_in_stored_order(size):
    assert [row for _, _, row in keys(6, 6, count=24, size=size)] == [*range(6)] * 4


def test_a_buffer_mixes_across_shards():
    assert len({shard for _, shard, _ in keys(5, 5, 5, count=6, size=15)}) > 1


@pytest.mark.parametrize(
    ("sizes", "readers", "size"),
    [((2, 0, 5), 1, 3), ((1, 4, 2, 3, 2), 2, 4), ((7, 7), 3, 2), ((7,), 2, 1), ((6, 5), 1, 100)],
)
def test_resume_at_every_place(sizes, readers, size):
    for reader in range(readers):
        options = {"seed": 3, "reader": reader, "readers": readers, "shuffle_buffer": size}
        whole = list(islice(read_stream(Rows(*sizes), **options), 40))
        for stop in range(30):
            resumed = read_stream(Rows(*sizes), **options, start=whole[stop][2])
            assert list(islice(resumed, 9)) == whole[stop + 1 : stop + 10]


def test_the_position_is_saved_in_a_checkpoint(tmp_path):
    *_, (_, _, place) = islice(read_stream(Rows(5, 5), seed=0, reader=0, readers=1, shuffle_buffer=3), 17)
    torch.save({"place": tuple(place)}, tmp_path / "c.pt")
    assert StreamPosition(*torch.load(tmp_path / "c.pt", weights_only=True)["place"]) == place
    assert {type(number) for number in place} == {int}


def test_the_next_chunk_is_read_ahead():
    stream = Rows(40, 40)
    reading = read_stream(stream, seed=0, reader=0, readers=1, shuffle_buffer=10)
    read_before = 0
    for count in range(1, 61):
        next(reading)
        assert stream.read - read_before <= (10 + 1 if count == 1 else 2)
        assert stream.read <= count + 10
        read_before = stream.read


def test_samples_in_memory_are_no_more_than_a_chunk():
    """A sample's memory is free once it is given out, as one of the next chunk takes its place."""
    alive: set[int] = set()

    class Content(bytes):
        def __del__(self):
            alive.discard(id(self))

    class Counted(Rows):
        def read_shard(self, shard: int, *, start: int = 0) -> Iterator[Sample]:
            for sample in super().read_shard(shard, start=start):
                content = Content()
                alive.add(id(content))
                yield sample._replace(content=content)

    reading = read_stream(Counted(40, 40), seed=0, reader=0, readers=1, shuffle_buffer=10)
    assert max(len(alive) for _ in islice(reading, 60)) <= 10 + 3


def test_resuming_reads_no_more_than_two_chunks():
    options = {"seed": 0, "reader": 0, "readers": 1, "shuffle_buffer": 10}
    *_, (_, _, place) = islice(read_stream(Rows(500, 500), **options), 333)
    stream = Rows(500, 500)
    next(read_stream(stream, **options, start=place))
    assert stream.read <= 20


@pytest.mark.parametrize(("sizes", "readers", "reader"), [((0, 0), 1, 0), ((3,), 5, 4), ((), 1, 0)])
def test_a_reader_without_images_gives_up(sizes, readers, reader):
    reading = read_stream(Rows(*sizes), seed=0, reader=reader, readers=readers, shuffle_buffer=3)
    with pytest.raises(UserError, match=rf"loader process {reader + 1} of {readers} gets no image .*num_workers"):
        next(reading)


def test_a_pass_without_images_is_not_the_end():
    """Two readers and an empty shard: in each pass one of them gets nothing."""
    seen = [{key[0] for key in keys(4, 0, count=12, reader=reader, readers=2)} for reader in (0, 1)]
    assert all(len(passes) == 3 for passes in seen)
    assert not seen[0] & seen[1]
