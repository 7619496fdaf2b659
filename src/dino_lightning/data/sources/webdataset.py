"""WebDataset shards: local or remote tar files, in which neighboring members with one name are a sample.

The `webdataset` library expands patterns, opens everything except http(s), reads the tar files and groups their
members. It would start `curl` for http(s); here Python reads the URL, which needs no other program and resumes a broken
connection where it stopped.
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
from dino_lightning.data.decode_formats import read_npy
from dino_lightning.data.sources.base import Content, Sample, Splits
from dino_lightning.data.sources.registry import register_source
from dino_lightning.errors import UserError, did_you_mean

BROKEN = (OSError, EOFError, HTTPException, tarfile.TarError, zlib.error)
"""Errors of reading a damaged or interrupted shard."""
BLOCK = 512
"""Bytes per block of a tar file."""
MAX_ATTEMPTS = 5
"""Attempts in a row to read from a URL."""
FIRST_WAIT_S = 0.25
"""Time before the second attempt; it doubles before each later one."""
TIMEOUT_S = 60
"""Time without an answer after which a connection is considered broken."""


class WebDatasetImages:
    """The samples of tar shards; members with an extension in `image_keys` are images."""

    classes = None

    def __init__(self, urls: list[str], *, images: int, image_keys: list[str]):
        self.urls, self.images = urls, images
        self.image_keys = frozenset(key.lower().removeprefix(".") for key in image_keys)

    @property
    def shards(self) -> int:
        """Number of tar files."""
        return len(self.urls)

    def read_shard(self, shard: int, *, start: int = 0) -> Iterator[Sample]:
        """The samples from number `start` on. If the shard is damaged, the last sample has no content and says so."""
        name, errors = shard_name(self.urls[shard]), []
        files = _files(self.urls[shard], on_error=errors.append)
        count = 0
        # The library would stop at the second of two neighbors with one name; the handler ignores it.
        for members in group_by_keys(files, suffixes={*self.image_keys, "cls"}, handler=ignore_and_continue):
            if count >= start:
                yield self._sample(members, shard=name)
            count += 1
        if errors and count >= start:
            yield Sample(None, -1, f"{name} (truncated or unreadable after {count} samples: {errors[0]})")

    def _sample(self, members: dict[str, Any], *, shard: str) -> Sample:
        image = next((key for key in members if key in self.image_keys), None)
        return Sample(
            None if image is None else _content(members[image], key=image),
            _label(members.get("cls")),
            f"{shard} {members['__key__']}",
        )


@register_source("webdataset", WebDatasetData)
def open_webdataset(config: WebDatasetData) -> Splits:
    """The shards as a training stream, without a validation split."""
    if not config.image_keys:
        raise UserError("data.image_keys=[] selects no images; expected the extensions of the members that are images")
    urls = expand_shards(config.shards)
    stream = WebDatasetImages(urls, images=config.images, image_keys=list(config.image_keys))
    return Splits(stream, None, f"{len(urls)} shards, read as a stream: no k-NN evaluation")


def expand_shards(shards: str) -> list[str]:
    """URLs and absolute paths of a pattern: braces, `::` between patterns, `*` in local ones, or a folder of tar files.

    Raises `UserError` for a local shard that does not exist and for unsupported URLs.
    """
    try:
        patterns = expand_urls(shards)
    except (ValueError, AssertionError) as error:
        raise UserError(f"data.shards={shards} is not a pattern of paths or URLs ({error})") from error
    urls: list[str] = []
    for pattern in patterns:
        match = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*):", pattern)
        scheme = match[1].lower() if match else ""
        if scheme in ("", "file"):
            path = url2pathname(urlsplit(pattern).path) if scheme else pattern
            urls += _local(usable_path("data.shards", path).absolute(), shards=shards)
        elif scheme in gopen_schemes:
            urls.append(pattern)
        else:
            supported = sorted(set(gopen_schemes) - {"__default__"})
            raise UserError(
                f"data.shards={shards}: the scheme '{scheme}' is not supported; {did_you_mean(scheme, supported)}, or "
                "'pipe:COMMAND' with a command that prints the shard"
            )
    return urls


def shard_name(url: str) -> str:
    """File name of a shard, without the query of a URL, which may contain an access key; a command is unchanged."""
    return url if url.startswith("pipe:") else Path(urlsplit(url).path if "://" in url else url).name


def _local(path: Path, *, shards: str) -> list[str]:
    if path.is_dir():
        tars = [str(file) for file in sorted(path.iterdir()) if _is_tar(file.name)]
        if not tars:
            raise UserError(f"data.shards={shards}: the folder '{path}' contains no *.tar")
        return tars
    if path.exists():  # including named pipes and names with brackets
        return [str(path)]
    matches = sorted(glob.glob(str(path)))
    if matches:
        return matches
    folder = next(parent for parent in path.parents if parent.is_dir())
    missing = path.relative_to(folder).parts[0]
    siblings = [file.name for file in folder.iterdir() if file.is_dir() or _is_tar(file.name)]
    hint = did_you_mean(missing, siblings) if siblings else "it contains no *.tar"
    raise UserError(f"data.shards={shards}: '{path}' does not exist, no '{missing}' in '{folder}'; {hint}")


def _is_tar(name: str) -> bool:
    return name.endswith((".tar", ".tar.gz", ".tgz")) and not name.startswith(".")


def _files(url: str, *, on_error: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The readable members of a tar file; `on_error` is called with the reason if it cannot be read to its end."""
    source: Any = None
    try:
        source = HttpFile(url) if url.lower().startswith(("http://", "https://")) else gopen(url)
        # Not the library's pipe, which drops its last data if the command has failed; `close` reports that, too.
        stream = _TarStream(getattr(source, "stream", source))
        for member in tar_file_iterator(stream):  # type: ignore[arg-type]  # any file will do
            yield {**member, "__url__": url}
        while stream.read(1 << 20):  # the padding, because a command that cannot write it would report a failure
            pass
        source.close()  # raises if a command has failed
        if stream.is_truncated:
            on_error("it lacks the end mark of a tar file")
    except BROKEN as error:
        reason = str(error).partition(" @ ")[0] or type(error).__name__
        try:
            if source is not None:
                source.close()
        except BROKEN as failed:  # "empty file" alone does not say that the command was not found
            reason = f"{reason}; {failed}" if str(failed) not in reason else reason
        on_error(reason)
    finally:
        if source is not None:
            with suppress(*BROKEN):
                source.close()


class _TarStream:
    """A stream that remembers its first and last bytes, because `tarfile` treats a broken header as the end."""

    def __init__(self, source: Any):
        self._source, self._head, self._tail = source, b"", b""

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        data = self._source.read(size)
        self._head = self._head or data[:6]
        self._tail = (self._tail + data if len(data) < BLOCK else data)[-BLOCK:]
        return data

    @property
    def is_truncated(self) -> bool:
        """Whether an uncompressed tar file ends without a block of zeros."""
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
    """A URL that is read sequentially. Raises `OSError` if it cannot be read."""

    def __init__(self, url: str):
        self.url = url
        self._position = 0
        self._total: int | None = None
        self._response: Any = None

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        for attempt in range(MAX_ATTEMPTS):
            try:
                response = self._response or self._connect()
                data = response.read(size)
                if not data and self._total is not None and self._position < self._total:
                    raise ConnectionError(f"the connection broke after {self._position} of {self._total} bytes")
            except (OSError, HTTPException) as error:
                self.close()
                final = isinstance(error, HTTPError) and error.code < 500 and error.code not in (408, 429)
                if final or attempt == MAX_ATTEMPTS - 1:
                    raise
                time.sleep(FIRST_WAIT_S * 2**attempt)
            else:
                self._position += len(data)
                return data
        raise AssertionError

    def close(self) -> None:
        """Close the connection."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def _connect(self) -> Any:
        headers = {"Range": f"bytes={self._position}-"} if self._position else {}
        self._response = response = urlopen(Request(self.url, headers=headers), timeout=TIMEOUT_S)
        length = response.headers.get("Content-Length")
        if self._position == 0:
            self._total = None if length is None else int(length)
        remaining = 0 if response.status == 206 else self._position  # a server without ranges sends everything again
        while remaining:
            skipped = response.read(min(remaining, 1 << 20))
            if not skipped:
                raise ConnectionError(f"the connection broke before byte {self._position}")
            remaining -= len(skipped)
        return response
