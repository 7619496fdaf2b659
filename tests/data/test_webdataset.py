"""WebDataset shards written by the library and by `tarfile`, read from disk, from an HTTP server and from commands."""

import gzip
import io
import pickle
from itertools import islice

import numpy as np
import pytest
from source_cases import png
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset_cases import MEMBERS, contents, stream, write_shards, write_tar

from dino_lightning.config import WebDatasetData
from dino_lightning.data.shard_order import read_stream
from dino_lightning.data.sources import ImageStream, open_sources
from dino_lightning.data.sources.webdataset import expand_shards
from dino_lightning.errors import UserError


class TestShards:
    def test_samples_of_the_librarys_writer(self, tmp_path):
        opened = open_sources(WebDatasetData(shards=write_shards(tmp_path, 3, 2), images=5), seed=0)
        assert isinstance(opened.train, ImageStream)
        assert (opened.train.shards, opened.train.images, opened.train.classes, opened.val) == (2, 5, None, None)
        assert opened.remark == "2 shards, read as a stream: no k-NN evaluation"
        samples = [sample for shard in range(2) for sample in opened.train.read_shard(shard)]
        assert [sample.content for sample in samples] == [png(number) for number in range(5)]
        assert [sample.label for sample in samples] == [0, 1, 2, 0, 1]
        assert [sample.name for sample in samples][2:4] == ["s-0.tar 0002", "s-1.tar 0003"]

    def test_reading_starts_at_a_row(self, tmp_path):
        pattern = write_shards(tmp_path, 4)
        for start in range(6):
            assert contents(pattern, start=start) == [png(number) for number in range(start, 4)]

    def test_a_copy_reads_the_same(self, tmp_path):
        source = stream(write_shards(tmp_path, 3))
        copy = pickle.loads(pickle.dumps(source))
        assert list(copy.read_shard(0)) == list(source.read_shard(0))

    def test_first_member_with_an_image_ending(self, tmp_path):
        members = [("d/a.txt", b"t"), ("d/a.JPG", b"1"), ("d/a.png", b"2"), ("d/b.seg.png", b"3"), ("d/c.png", b"4")]
        tar = write_tar(tmp_path / "s.tar", members)
        assert contents(tar) == [b"1", None, b"4"]
        assert contents(tar, image_keys=["png"]) == [b"2", None, b"4"]
        assert contents(tar, image_keys=[".seg.PNG"]) == [None, b"3", None]
        assert [sample.name for sample in stream(tar).read_shard(0)] == ["s.tar d/a", "s.tar d/b", "s.tar d/c"]

    def test_labels(self, tmp_path):
        members = [("a.png", b""), ("b.cls", b"7\n"), ("b.png", b""), ("c.png", b""), ("c.cls", b"cat")]
        assert [one.label for one in stream(write_tar(tmp_path / "s.tar", members)).read_shard(0)] == [-1, 7, -1]

    def test_arrays(self, tmp_path):
        array = np.arange(24, dtype=np.uint16).reshape(2, 4, 3)
        buffer = io.BytesIO()
        np.save(buffer, array)
        tar = write_tar(tmp_path / "s.tar", [("a.npy", buffer.getvalue()), ("b.npy", b"no array"), ("c.npy", b"")])
        first, *others = contents(tar)
        assert first.dtype == np.uint16
        assert np.array_equal(first, array)
        assert others == [None, None]

    def test_second_member_of_a_name_does_not_count(self, tmp_path):
        tar = write_tar(tmp_path / "s.tar", [("a.png", b"1"), ("a.png", b"2"), ("b.png", b"3")])
        assert contents(tar) == [b"1", b"3"]

    def test_empty_shard(self, tmp_path):
        assert contents(write_tar(tmp_path / "s.tar", [])) == []

    @pytest.mark.parametrize("mode", ["w:gz", "w"])
    def test_compressed_ones(self, tmp_path, mode):
        assert contents(write_tar(tmp_path / "s.tar.gz", [("a.png", png(1))], mode=mode)) == [png(1)]


class TestDamage:
    @pytest.mark.parametrize(
        ("size", "whole"),
        [
            (0, 0),
            (300, 0),
            (512, 0),
            (1000, 0),
            (3072, 2),
            (3200, 2),
            (3584, 2),
            (4200, 2),
            (4300, 3),
            (7680, 5),
            (7700, 5),
        ],
    )
    def test_a_truncated_shard_yields_its_readable_samples(self, tmp_path, size, whole):
        tar = write_tar(tmp_path / "s.tar", MEMBERS)
        tar.write_bytes(tar.read_bytes()[:size])
        *samples, last = stream(tar).read_shard(0)
        assert [sample.content for sample in samples] == [content for _, content in MEMBERS[:whole]]
        assert last.content is None
        assert last.name.startswith(f"s.tar (truncated or unreadable after {whole} samples: ")
        assert list(stream(tar).read_shard(0, start=whole)) == [last]
        assert list(stream(tar).read_shard(0, start=whole + 1)) == []

    def test_truncated_compression(self, tmp_path):
        tar = write_tar(tmp_path / "s.tar", [(f"{n}.png", np.random.default_rng(n).bytes(30_000)) for n in range(4)])
        packed = gzip.compress(tar.read_bytes())
        tar.write_bytes(packed[: len(packed) // 2])
        *samples, last = stream(tar).read_shard(0)
        assert 1 <= len(samples) <= 2
        assert "truncated" in last.name

    @pytest.mark.parametrize("content", [b"no tar at all" * 100, b"\x1f\x8b and no gzip"])
    def test_no_tar(self, tmp_path, content):
        (tmp_path / "s.tar").write_bytes(content)
        (sample,) = stream(tmp_path / "s.tar").read_shard(0)
        assert sample.content is None
        assert "s.tar (truncated or unreadable after 0 samples" in sample.name

    def test_garbage_between_members(self, tmp_path):
        tar = write_tar(tmp_path / "s.tar", MEMBERS)
        content = bytearray(tar.read_bytes())
        content[3072:3584] = b"x" * 512
        tar.write_bytes(content[:7680])
        assert [sample.content is None for sample in stream(tar).read_shard(0)] == [False, False, True]

    def test_a_missing_shard(self, tmp_path):
        source = stream(write_tar(tmp_path / "s.tar", MEMBERS))
        (tmp_path / "s.tar").unlink()
        (sample,) = source.read_shard(0)
        assert "No such file" in sample.name


class TestPatterns:
    @pytest.fixture(autouse=True)
    def shards(self, tmp_path):
        for name in ("b.tar", "a.tar", "c.tgz", "x[1].tar"):
            write_tar(tmp_path / name, [("a.png", b"1")])
        (tmp_path / "notes.txt").touch()

    @pytest.mark.parametrize(
        ("pattern", "names"),
        [
            ("{a,b}.tar", ["a.tar", "b.tar"]),
            ("b.tar::a.tar", ["b.tar", "a.tar"]),
            ("?.tar", ["a.tar", "b.tar"]),
            ("*.tgz::{a..b}.tar", ["c.tgz", "a.tar", "b.tar"]),
            ("x[1].tar", ["x[1].tar"]),
            ("", ["a.tar", "b.tar", "c.tgz", "x[1].tar"]),
        ],
    )
    def test_local(self, tmp_path, monkeypatch, pattern, names):
        monkeypatch.chdir(tmp_path)
        assert expand_shards(pattern or str(tmp_path)) == [str(tmp_path / name) for name in names]

    def test_home_and_file_urls(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert expand_shards(f"~/a.tar::file://{tmp_path}/b.tar") == [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]

    def test_urls_are_not_changed(self):
        wanted = ["https://h/s-08.tar?key=a", "https://h/s-09.tar?key=a", "pipe:cat a.tar", "gs://b/c.tar"]
        assert expand_shards("https://h/s-{08..09}.tar?key=a::pipe:cat a.tar::gs://b/c.tar") == wanted

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"shards": "{root}/aa.tar"}, r"data\.shards=.*'.*aa\.tar' does not exist.* did you mean 'a\.tar'"),
            ({"shards": "{root}/nothing*"}, r"nothing\*' does not exist.* choose one of"),
            ({"shards": "{root}/deep/er/a.tar"}, r"no 'deep' in"),
            ({"shards": "{root}/empty"}, r"empty' contains no \*\.tar"),
            ({"shards": "s3://bucket/a.tar"}, r"scheme 's3' is not supported; .*gs.*pipe:COMMAND"),
            ({"shards": "htp://bucket/a.tar"}, r"scheme 'htp' is not supported; did you mean 'http'"),
            ({"shards": "{{a,b"}, r"data\.shards=\{a,b is not a pattern"),
            ({"shards": "{root}/a.tar", "image_keys": []}, r"data\.image_keys=\[\]"),
        ],
    )
    def test_wrong_settings_are_named(self, tmp_path, options, words):
        (tmp_path / "empty").mkdir()
        options = {**options, "shards": options["shards"].format(root=tmp_path)}
        with pytest.raises(UserError, match=words):
            open_sources(WebDatasetData(**{"images": 5, **options}), seed=0)


class Readers(IterableDataset):
    """What each of two loader processes of one of two ranks sees of a stream."""

    def __init__(self, source: ImageStream, *, rank: int):
        self.source, self.rank = source, rank

    def __iter__(self):
        worker = get_worker_info()
        assert worker is not None
        reading = read_stream(self.source, seed=1, reader=2 * self.rank + worker.id, readers=4, shuffle_buffer=3)
        return ((key, sample.content) for sample, key, _ in islice(reading, 12))


@pytest.mark.parametrize("sizes", [(4, 3, 5, 4, 4), (8, 8)])
def test_two_ranks_of_two_loader_processes(tmp_path, sizes):
    source = stream(write_shards(tmp_path, *sizes))
    seen = [
        pair
        for rank in range(2)
        for pair in DataLoader(
            Readers(source, rank=rank), batch_size=None, num_workers=2, multiprocessing_context="fork"
        )
    ]
    first_pass = sorted((tuple(key), content) for key, content in seen if key[0] == 0)
    numbers = {(shard, row): sum(sizes[:shard]) + row for shard, size in enumerate(sizes) for row in range(size)}
    assert first_pass == [((0, *place), png(number)) for place, number in numbers.items()]
