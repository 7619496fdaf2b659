"""WebDataset shards written by the library and by `tarfile`, read from disk, from an HTTP server and from commands."""

import gzip
import io
import pickle
import shutil
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import webdataset
from pictures import png
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dino_lightning.config import WebDatasetData
from dino_lightning.data.sources import ImageStream, open_sources
from dino_lightning.data.sources import webdataset as reader
from dino_lightning.data.sources.webdataset import HttpFile, WebDatasetImages, expand_shards
from dino_lightning.data.stream_order import read_stream
from dino_lightning.errors import UserError

Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Members, *, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder: Path, *sizes: int) -> str:
    """Shards of pictures 0, 1, … with labels, written by the library; the pattern of them."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        with webdataset.TarWriter(str(folder / f"s-{shard}.tar")) as tar:
            for _ in range(size):
                tar.write({"__key__": f"{number:04}", "png": png(number), "cls": number % 3, "json": {"n": number}})
                number += 1
    return f"{folder}/s-{{0..{len(sizes) - 1}}}.tar"


def stream(shards: Any, **options: Any) -> WebDatasetImages:
    opened = open_sources(WebDatasetData(shards=str(shards), images=10, **options), seed=0)
    assert isinstance(opened.train, WebDatasetImages)
    return opened.train


def contents(shards: Any, *, shard: int = 0, start: int = 0, **options: Any) -> list:
    return [sample.content for sample in stream(shards, **options).read_shard(shard, start=start)]


class TestShards:
    def test_samples_of_the_librarys_writer(self, tmp_path):
        opened = open_sources(WebDatasetData(shards=write_shards(tmp_path, 3, 2), images=5), seed=0)
        assert isinstance(opened.train, ImageStream)
        assert (opened.train.shards, opened.train.images, opened.train.classes, opened.val) == (2, 5, None, None)
        assert opened.notice == "2 shards, read as a stream: no k-NN evaluation"
        samples = [sample for shard in range(2) for sample in opened.train.read_shard(shard)]
        assert [sample.content for sample in samples] == [png(number) for number in range(5)]
        assert [sample.label for sample in samples] == [0, 1, 2, 0, 1]
        assert [sample.name for sample in samples][2:4] == ["s-0.tar 0002", "s-1.tar 0003"]

    def test_from_a_row_on(self, tmp_path):
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
    MEMBERS: ClassVar[Members] = [(f"{number}.png", bytes([number]) * 700) for number in range(5)]  # 1536 bytes each

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
    def test_a_truncated_shard_gives_what_is_readable(self, tmp_path, size, whole):
        tar = write_tar(tmp_path / "s.tar", self.MEMBERS)
        tar.write_bytes(tar.read_bytes()[:size])
        *samples, last = stream(tar).read_shard(0)
        assert [sample.content for sample in samples] == [content for _, content in self.MEMBERS[:whole]]
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
        tar = write_tar(tmp_path / "s.tar", self.MEMBERS)
        content = bytearray(tar.read_bytes())
        content[3072:3584] = b"x" * 512
        tar.write_bytes(content[:7680])
        assert [sample.content is None for sample in stream(tar).read_shard(0)] == [False, False, True]

    def test_a_shard_that_has_gone(self, tmp_path):
        source = stream(write_tar(tmp_path / "s.tar", self.MEMBERS))
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

    def test_urls_stay(self):
        wanted = ["https://h/s-08.tar?key=a", "https://h/s-09.tar?key=a", "pipe:cat a.tar", "gs://b/c.tar"]
        assert expand_shards("https://h/s-{08..09}.tar?key=a::pipe:cat a.tar::gs://b/c.tar") == wanted

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"shards": "{root}/aa.tar"}, r"data\.shards=.*'.*aa\.tar' does not exist.* did you mean 'a\.tar'"),
            ({"shards": "{root}/nothing*"}, r"nothing\*' does not exist.* choose one of"),
            ({"shards": "{root}/deep/er/a.tar"}, r"no 'deep' in"),
            ({"shards": "{root}/empty"}, r"empty' holds no \*\.tar"),
            ({"shards": "s3://bucket/a.tar"}, r"'s3' cannot be opened.*gs.*pipe:COMMAND"),
            ({"shards": "htp://bucket/a.tar"}, r"'htp' cannot be opened, did you mean 'http'"),
            ({"shards": "{{a,b"}, r"data\.shards=\{a,b is not a pattern"),
            ({"shards": "{root}/a.tar", "images": 0}, r"data\.images=0"),
            ({"shards": "{root}/a.tar", "image_keys": []}, r"data\.image_keys=\[\]"),
        ],
    )
    def test_wrong_settings_are_named(self, tmp_path, options, words):
        (tmp_path / "empty").mkdir()
        options = {**options, "shards": options["shards"].format(root=tmp_path)}
        with pytest.raises(UserError, match=words):
            open_sources(WebDatasetData(**{"images": 5, **options}), seed=0)


class Server(SimpleHTTPRequestHandler):
    """Files of a folder, which gives up after `cut` bytes of an answer, and knows ranges if `ranges`."""

    requests: list[str | None]
    cut = 10**9
    ranges = False
    busy = 0

    def do_GET(self):
        wanted = self.headers.get("Range")
        Server.requests.append(wanted)
        if Server.busy:
            Server.busy -= 1
            return self.send_error(503)
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            return self.send_error(404)
        content = file.read_bytes()
        begin = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.ranges else 0
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        self.wfile.write(content[begin : begin + self.cut])
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def url(tmp_path, monkeypatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(reader, "WAIT", 0.001)
    for name, value in {"requests": [], "cut": 10**9, "ranges": False, "busy": 0}.items():
        monkeypatch.setattr(Server, name, value, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class TestUrls:
    def test_shards_behind_http_without_other_programs(self, tmp_path, url, monkeypatch):
        write_shards(tmp_path, 3, 2)
        monkeypatch.setenv("PATH", "")  # no curl
        source = stream(url + "/s-{0..1}.tar?key=secret")
        samples = [sample for shard in range(2) for sample in source.read_shard(shard)]
        assert [sample.content for sample in samples] == [png(number) for number in range(5)]
        assert samples[0].name == "s-0.tar 0000"

    @pytest.mark.parametrize("ranges", [True, False])
    def test_a_connection_that_breaks_off_is_taken_up_again(self, tmp_path, url, monkeypatch, ranges):
        write_shards(tmp_path, 8)
        size = (tmp_path / "s-0.tar").stat().st_size
        monkeypatch.setattr(Server, "cut", size * 2 // 5 if ranges else size)
        monkeypatch.setattr(Server, "ranges", ranges)
        if not ranges:  # once, as a server that always begins again never ends
            monkeypatch.setattr(HttpFile, "_connect", break_once(HttpFile._connect))
        assert contents(f"{url}/s-0.tar") == [png(number) for number in range(8)]
        assert len(Server.requests) == (3 if ranges else 2)
        assert Server.requests[1].startswith("bytes=")

    def test_a_server_that_never_gets_further_is_given_up(self, tmp_path, url, monkeypatch):
        write_tar(tmp_path / "s.tar", TestDamage.MEMBERS * 10)
        monkeypatch.setattr(Server, "cut", 20_000)
        *samples, last = stream(f"{url}/s.tar").read_shard(0)
        assert 10 < len(samples) < 14
        assert "broke off" in last.name

    def test_a_busy_server_is_asked_again(self, tmp_path, url, monkeypatch):
        write_shards(tmp_path, 2)
        monkeypatch.setattr(Server, "busy", 3)
        assert contents(f"{url}/s-0.tar") == [png(0), png(1)]

    def test_a_missing_shard_is_not_asked_for_again(self, url):
        (sample,) = stream(f"{url}/none.tar").read_shard(0)
        assert sample.content is None
        assert "404" in sample.name
        assert len(Server.requests) == 1

    def test_no_server(self, url):
        (sample,) = stream("http://127.0.0.1:9/s.tar").read_shard(0)
        assert "refused" in sample.name

    def test_commands(self, tmp_path):
        write_shards(tmp_path, 3)
        source = stream(f"pipe:cat {tmp_path}/s-0.tar")
        assert [sample.content for sample in source.read_shard(0)] == [png(number) for number in range(3)]
        next(iter(source.read_shard(0)))  # and stops in the middle

    def test_a_command_that_fails(self, tmp_path):
        write_tar(tmp_path / "s.tar", TestDamage.MEMBERS)
        *samples, last = stream(f"pipe:cat {tmp_path}/s.tar; exit 3").read_shard(0)
        assert len(samples) == 5
        assert "exit 3" in last.name

    def test_a_program_that_is_not_there(self, monkeypatch):
        monkeypatch.setenv("PATH", "")
        assert shutil.which("gsutil") is None
        (sample,) = stream("gs://bucket/s.tar").read_shard(0)
        assert "gsutil" in sample.name

    def test_a_command_that_gives_nothing(self):
        (sample,) = stream("pipe:exit 9").read_shard(0)
        assert "empty file" in sample.name
        assert "exit 9" in sample.name


def break_once(connect: Any) -> Any:
    """The connection's first answer ends after 3000 bytes."""

    def connected(file: HttpFile) -> Any:
        answer = connect(file)
        if len(Server.requests) == 1:
            file._response = io.BytesIO(answer.read(3000))
            answer.close()
        return file._response

    return connected


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
