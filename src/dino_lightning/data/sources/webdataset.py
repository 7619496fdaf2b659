"""WebDataset shards: tar files, local or at URLs, whose neighboring members of one name are a sample.

The `webdataset` library expands patterns, opens everything but http(s), walks through the tar files and groups their
members. For http(s) it starts `curl`; here Python reads the URL, so that no other program is needed and a connection
that breaks off is taken up again where it stopped.
"""

import glob
import re
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, url2pathname, urlopen

from webdataset.gopen import gopen, gopen_schemes
from webdataset.handlers import ignore_and_continue
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_iterator

from dino_lightning.config import WebDatasetData
from dino_lightning.config.paths import usable_path
from dino_lightning.data.npy import read_npy
from dino_lightning.data.sources.base import Content, Sample, Splits
from dino_lightning.errors import UserError, did_you_mean

BROKEN = (OSError, EOFError, HTTPException, tarfile.TarError, zlib.error)
"""What reading a damaged or interrupted shard raises."""
BLOCK = 512
"""Bytes of a block of a tar file."""
TRIES = 5
"""Attempts without a single byte after which a URL is given up."""
WAIT = 0.25
"""Seconds before the second attempt, twice as many before each later one."""
TIMEOUT = 60
"""Seconds without an answer after which a connection counts as broken off."""


class WebDatasetImages:
    """The samples of tar shards; `image_keys` are the endings, in lower case, that make a member an image."""

    classes = None

    def __init__(self, urls: list[str], *, images: int, image_keys: list[str]):
        self.urls = urls
        self.images = images
        self.image_keys = frozenset(key.lower().removeprefix(".") for key in image_keys)

    @property
    def shards(self) -> int:
        """Number of tar files."""
        return len(self.urls)

    def read_shard(self, shard: int, *, start: int = 0) -> Iterator[Sample]:
        """The samples from number `start` on. A damaged shard ends with a sample without content that says so."""
        name, trouble = shard_name(self.urls[shard]), []
        files = _files(self.urls[shard], note=trouble.append)
        count = 0
        # Of two neighbors of one name, the library would stop at the second; here the first one counts.
        for members in group_by_keys(files, suffixes={*self.image_keys, "cls"}, handler=ignore_and_continue):
            if count >= start:
                yield self._sample(members, shard=name)
            count += 1
        if trouble and count >= start:
            yield Sample(None, -1, f"{name} (truncated or unreadable after {count} samples: {trouble[0]})")

    def _sample(self, members: dict[str, Any], *, shard: str) -> Sample:
        image = next((key for key in members if key in self.image_keys), None)
        return Sample(
            None if image is None else _content(members[image], key=image),
            _label(members.get("cls")),
            f"{shard} {members['__key__']}",
        )


def open_webdataset(config: WebDatasetData) -> Splits:
    """The shards as a training stream; there is no validation split."""
    if config.images < 1:
        raise UserError(f"data.images={config.images} is not a number of images; give 1 or more")
    if not config.image_keys:
        raise UserError("data.image_keys=[] finds no images; give the endings of the members that are images")
    urls = expand_shards(config.shards)
    stream = WebDatasetImages(urls, images=config.images, image_keys=list(config.image_keys))
    return Splits(stream, None, f"{len(urls)} shards, read as a stream: no k-NN evaluation")


def expand_shards(shards: str) -> list[str]:
    """URLs and absolute paths: braces, `::` between patterns, `*` in local ones, and a folder for the tars in it.

    Raises `UserError` for a local shard that is not there and for URLs that cannot be opened.
    """
    try:
        patterns = expand_urls(shards)
    except (ValueError, AssertionError) as error:
        raise UserError(f"data.shards={shards} is not a pattern of paths or URLs ({error})") from error
    found: list[str] = []
    for pattern in patterns:
        match = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*):", pattern)
        scheme = match[1].lower() if match else ""
        if scheme in ("", "file"):
            path = url2pathname(urlsplit(pattern).path) if scheme else pattern
            found += _local(usable_path("data.shards", path).absolute(), shards=shards)
        elif scheme in gopen_schemes:
            found.append(pattern)
        else:
            known = sorted(set(gopen_schemes) - {"__default__"})
            way = "; a command that prints the shard can be given as 'pipe:COMMAND'"
            raise UserError(f"data.shards={shards}: '{scheme}' cannot be opened, {did_you_mean(scheme, known)}{way}")
    return found


def shard_name(url: str) -> str:
    """File name of a shard; a command as it is. What follows in a URL, such as an access key, is left out."""
    return url if url.startswith("pipe:") else Path(urlsplit(url).path if "://" in url else url).name


def _local(path: Path, *, shards: str) -> list[str]:
    if path.is_dir():
        tars = [str(file) for file in sorted(path.iterdir()) if _is_tar(file.name)]
        if not tars:
            raise UserError(f"data.shards={shards}: the folder '{path}' holds no *.tar")
        return tars
    if path.exists():  # also a pipe or a name with brackets
        return [str(path)]
    matches = sorted(glob.glob(str(path)))
    if matches:
        return matches
    folder = next(parent for parent in path.parents if parent.is_dir())
    lost = path.relative_to(folder).parts[0]
    beside = [file.name for file in folder.iterdir() if file.is_dir() or _is_tar(file.name)]
    hint = did_you_mean(lost, beside) if beside else "it holds no *.tar"
    raise UserError(f"data.shards={shards}: '{path}' does not exist, no '{lost}' in '{folder}'; {hint}")


def _is_tar(name: str) -> bool:
    return name.endswith((".tar", ".tar.gz", ".tgz")) and not name.startswith(".")


def _files(url: str, *, note: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Members of a tar file, as far as it can be read; `note` gets the reason where that is not to its end."""
    source = None
    try:
        source = _open(url)
        # The library's pipe drops what it has just read when its command has failed meanwhile; `close` tells as well.
        stream = _Watched(getattr(source, "stream", source))
        for member in tar_file_iterator(stream):  # type: ignore[arg-type]  # any file will do
            yield {**member, "__url__": url}
        while stream.read(1 << 20):  # the padding: a command that is cut off there would report a failure
            pass
        source.close()  # raises where a command has failed
        if stream.cut_off:
            note("it lacks the end mark of a tar file")
    except BROKEN as error:
        reason = str(error).partition(" @ ")[0] or type(error).__name__
        try:
            if source is not None:
                source.close()
        except BROKEN as failed:  # "empty file" alone does not tell that the command was not found
            reason = f"{reason}; {failed}" if str(failed) not in reason else reason
        note(reason)
    finally:
        if source is not None:
            with suppress(*BROKEN):
                source.close()


def _open(url: str) -> Any:
    return HttpFile(url) if url.lower().startswith(("http://", "https://")) else gopen(url)


class _Watched:
    """A stream that remembers its beginning and end: `tarfile` takes a broken header for the end of the file."""

    def __init__(self, source: Any):
        self._source = source
        self._head = self._tail = b""

    def read(self, size: int) -> bytes:
        """The next bytes, `size` or fewer; none at the end."""
        data = self._source.read(size)
        self._head = self._head or data[:6]
        self._tail = (self._tail + data if len(data) < BLOCK else data)[-BLOCK:]
        return data

    @property
    def cut_off(self) -> bool:
        """Whether a tar file that is not compressed ends without a block of zeros."""
        return any(self._tail) and not self._head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))


def _content(data: bytes, *, key: str) -> Content | None:
    if key != "npy":
        return data
    try:
        return read_npy(data)
    except ValueError:
        return None


def _label(text: bytes | None) -> int:
    try:
        return int(text) if text is not None else -1
    except ValueError:
        return -1


class HttpFile:
    """A URL read from beginning to end. Raises `OSError` where it cannot be."""

    def __init__(self, url: str):
        self.url = url
        self._at = 0
        self._total: int | None = None
        self._response: Any = None

    def read(self, size: int) -> bytes:
        """The next bytes, `size` or fewer; none at the end."""
        for attempt in range(TRIES):
            try:
                response = self._response or self._connect()
                data = response.read(size)
                if not data and self._total is not None and self._at < self._total:
                    raise ConnectionError(f"the connection broke off after {self._at} of {self._total} bytes")
            except (OSError, HTTPException) as error:
                self.close()
                final = isinstance(error, HTTPError) and error.code < 500 and error.code not in (408, 429)
                if final or attempt == TRIES - 1:
                    raise
                time.sleep(WAIT * 2**attempt)
            else:
                self._at += len(data)
                return data
        raise AssertionError

    def close(self) -> None:
        """Close the connection."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def _connect(self) -> Any:
        headers = {"Range": f"bytes={self._at}-"} if self._at else {}
        self._response = response = urlopen(Request(self.url, headers=headers), timeout=TIMEOUT)
        length = response.headers.get("Content-Length")
        if self._at == 0:
            self._total = None if length is None else int(length)
        left = 0 if response.status == 206 else self._at  # a server without ranges sends everything again
        while left:
            skipped = response.read(min(left, 1 << 20))
            if not skipped:
                raise ConnectionError(f"the connection broke off before byte {self._at}")
            left -= len(skipped)
        return response
