"""Images that cannot be read: replaced by their successors, counted over all processes, and named in a file.

Every loader process of every rank meets its own bad images, so the count is kept in the file system: `bad_images.txt`
has one line for each, "name, tab, reason". A resumed run goes on with the file of the run before.
"""

import errno
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Generic, TypeVar

import torch
from filelock import FileLock
from PIL import Image

from dino_lightning.data.decode import UnreadableImageError
from dino_lightning.data.sources.base import Content, ImageSource
from dino_lightning.errors import UserError, did_you_mean
from dino_lightning.runtime.console import warn

T = TypeVar("T")

UNREADABLE = (
    OSError,
    SyntaxError,  # Pillow's word for broken PNG, GIF and TIFF files
    ValueError,
    RuntimeError,  # torchvision's for all that it cannot decode
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What libraries raise at a broken image; `why_unreadable` sorts out what else they raise so."""

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of the system that would make every image look broken."""


def why_unreadable(error: Exception) -> str:
    """The reason as one line, for an `error` out of `UNREADABLE`; raises it again where the image is not to blame."""
    exhausted = isinstance(error, OSError) and error.errno in EXHAUSTED
    if exhausted or isinstance(error, UserError | torch.OutOfMemoryError):
        raise error
    if isinstance(error, OSError) and error.strerror and error.filename:
        return _one_line(error.strerror.lower())  # the name stands before the reason
    return _one_line(str(error) if isinstance(error, UnreadableImageError) else f"{type(error).__name__}: {error}")


class BadImages:
    """The bad images of one data set of `images` images, which has the file `path` to itself.

    Picklable; every process has its own copy and they meet in the file. Without a `path` each process counts alone.
    """

    def __init__(self, path: Path | None, *, images: int, on_error: str, max_bad_share: float) -> None:
        if on_error not in ("skip", "raise"):
            raise UserError(f"data.on_error={on_error} is not known; {did_you_mean(on_error, ('skip', 'raise'))}")
        if not 0 <= max_bad_share <= 1:
            raise UserError(f"data.max_bad_share={max_bad_share} is not a share of the images; give 0 to 1")
        self.path = path
        self.images, self.on_error, self.max_bad_share = images, on_error, max_bad_share
        self._known: dict[str, str] = {}
        self._read_up_to = 0

    def note(self, name: str, reason: str) -> None:
        """Count an image, once over all processes. Raises `UserError` where the settings say that the run stops."""
        name, reason = _one_line(name), _one_line(reason)
        if self.on_error == "raise":
            raise UserError(f"data.on_error=raise: {name} cannot be read ({reason})")
        if name not in self._known:
            self.add(name, reason)
        if len(self._known) > self.max_bad_share * self.images:
            raise UserError(
                f"data.max_bad_share={self.max_bad_share:g}: {len(self._known)} of {self.images} images cannot be read "
                f"{self.examples()}; mend or remove them, or go on without them with data.max_bad_share=1"
            )

    def add(self, name: str, reason: str) -> None:
        """Count an image, whatever the settings say."""
        name, reason = _one_line(name), _one_line(reason)
        if self.path is None:
            self._known.setdefault(name, reason)
            return
        try:
            self._add_to_file(self.path, name, reason)
        except OSError as error:  # a full disk, say: this process alone knows of the image
            self._known[name] = reason
            warn(f"{self.path} could not be written ({error.strerror or error}); not in it is {name} ({reason}).")

    def _add_to_file(self, path: Path, name: str, reason: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")), open(path, "a+b") as file:
            ended = self._read_others(file)
            if name not in self._known:
                line = f"{name}\t{reason}\n" if ended else f"\n{name}\t{reason}\n"
                file.write(line.encode("utf-8", "surrogateescape"))
                file.flush()
                self._known[name] = reason
                self._read_up_to = file.tell()

    def examples(self) -> str:
        """The first images and their reasons, and where the others stand."""
        first = [f"{name}: {reason}" for name, reason in list(self._known.items())[:3]]
        shown = f"({'; '.join(first)}{'; …' if len(self._known) > len(first) else ''})"
        return shown if self.path is None else f"{shown}, see {self.path}"

    def _read_others(self, file: IO[bytes]) -> bool:
        """Take in the lines that other processes appended; whether the last one is whole. The lock is held."""
        if file.seek(0, os.SEEK_END) < self._read_up_to:  # somebody emptied the file
            self._known, self._read_up_to = {}, 0
        file.seek(self._read_up_to)
        line = b"\n"
        for line in file:
            name, _, reason = line.decode("utf-8", "surrogateescape").rstrip("\n").partition("\t")
            if name:
                self._known[name] = reason
            self._read_up_to += len(line) if line.endswith(b"\n") else 0
        return line.endswith(b"\n")


class ReadableImages(Generic[T]):
    """Decoded images of a source. In the place of one that cannot be read stands the next one that can.

    No chance is in it: position i falls back to i + 1, i + 2, …, and to 0 after the last. A bad image is noted in `bad`
    (which stops the run where the settings say so), and this process does not try it again.
    """

    def __init__(
        self,
        source: ImageSource,
        decode: Callable[[Content], T],
        *,
        on_error: str,
        max_bad_share: float,
        bad_images: Path | None,
    ) -> None:
        self.source = source
        self.decode = decode
        self.bad = BadImages(bad_images, images=len(source), on_error=on_error, max_bad_share=max_bad_share)
        self._bad_positions: set[int] = set()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[T, int]:
        """The decoded image and the position that it has in the source."""
        total = len(self.source)
        if not 0 <= index < total:
            raise IndexError(f"image {index} of {total}")
        for shift in range(total):
            position = (int(index) + shift) % total
            if position in self._bad_positions:
                continue
            try:
                return self.decode(self.source.read(position)), position
            except UNREADABLE as error:
                reason = why_unreadable(error)
            self._bad_positions.add(position)
            self.bad.note(self.source.describe(position), reason)
        raise UserError(f"data: none of the {total} images can be read {self.bad.examples()}")


def _one_line(text: str) -> str:
    return re.sub(r"[\t\n\v\f\r]+", " ", text).strip()
