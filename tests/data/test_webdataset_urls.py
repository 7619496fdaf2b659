"""WebDataset shards behind HTTP and from commands."""

import io
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from source_cases import png
from webdataset_cases import MEMBERS, contents, stream, write_shards, write_tar

from dino_lightning.data.sources import webdataset as reader
from dino_lightning.data.sources.webdataset import HttpFile


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
    monkeypatch.setattr(reader, "FIRST_WAIT_S", 0.001)
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
    def test_a_broken_connection_is_resumed(self, tmp_path, url, monkeypatch, ranges):
        write_shards(tmp_path, 8)
        size = (tmp_path / "s-0.tar").stat().st_size
        monkeypatch.setattr(Server, "cut", size * 2 // 5 if ranges else size)
        monkeypatch.setattr(Server, "ranges", ranges)
        if not ranges:  # once, as a server that always begins again never ends
            monkeypatch.setattr(HttpFile, "_connect", break_once(HttpFile._connect))
        assert contents(f"{url}/s-0.tar") == [png(number) for number in range(8)]
        assert len(Server.requests) == (3 if ranges else 2)
        assert Server.requests[1].startswith("bytes=")

    def test_a_server_without_progress_is_an_error(self, tmp_path, url, monkeypatch):
        write_tar(tmp_path / "s.tar", MEMBERS * 10)
        monkeypatch.setattr(Server, "cut", 20_000)
        *samples, last = stream(f"{url}/s.tar").read_shard(0)
        assert 10 < len(samples) < 14
        assert "broke" in last.name

    def test_a_request_to_a_busy_server_is_repeated(self, tmp_path, url, monkeypatch):
        write_shards(tmp_path, 2)
        monkeypatch.setattr(Server, "busy", 3)
        assert contents(f"{url}/s-0.tar") == [png(0), png(1)]

    def test_a_request_for_a_missing_shard_is_not_repeated(self, url):
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
        write_tar(tmp_path / "s.tar", MEMBERS)
        *samples, last = stream(f"pipe:cat {tmp_path}/s.tar; exit 3").read_shard(0)
        assert len(samples) == 5
        assert "exit 3" in last.name

    def test_a_missing_program(self, monkeypatch):
        monkeypatch.setenv("PATH", "")
        assert shutil.which("gsutil") is None
        (sample,) = stream("gs://bucket/s.tar").read_shard(0)
        assert "gsutil" in sample.name

    def test_a_command_without_output(self):
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
