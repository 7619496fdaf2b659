"""Unreadable images: replaced by the next image, counted over all processes, and listed in a file.

Every loader process of every rank meets different bad images, so they are counted in the file system: `bad_images.txt`
has a line "name, tab, reason" for each. A resumed run continues the file.
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
from PIL import Image

from dino_lightning.data.decode import UnreadableImageError
from dino_lightning.data.sources.base import Content, ImageSource
from dino_lightning.errors import UserError
from dino_lightning.runtime.console import warn
from dino_lightning.runtime.locks import exclusive

T = TypeVar("T")

UNREADABLE = (
    OSError,
    SyntaxError,  # Pillow's error for broken PNG, GIF and TIFF files
    ValueError,
    RuntimeError,  # torchvision's error for everything that it cannot decode
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""Errors that libraries raise for a broken image; `why_unreadable` raises those with another cause again."""

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""System errors that would make every image look broken."""


def why_unreadable(error: Exception) -> str:
    """The reason in one line, for an `error` in `UNREADABLE`; raises the error again if the image is not its cause."""
    exhausted = isinstance(error, OSError) and error.errno in EXHAUSTED
    if exhausted or isinstance(error, UserError | torch.OutOfMemoryError):
        raise error
    if isinstance(error, OSError) and error.strerror and error.filename:
        return _one_line(error.strerror.lower())  # messages name the file themselves
    return _one_line(str(error) if isinstance(error, UnreadableImageError) else f"{type(error).__name__}: {error}")


class BadImages:
    """The bad images of a dataset with `images` images, listed in the file `path`, which no other dataset uses.

    Picklable; the copies in all processes synchronize through the file. Without a `path` each process counts alone.
    """

    def __init__(self, path: Path | None, *, images: int, on_error: str = "skip", max_bad_share: float = 1.0) -> None:
        self.path, self.images, self.on_error, self.max_bad_share = path, images, on_error, max_bad_share
        self._reasons: dict[str, str] = {}
        self._read_up_to = 0

    def note(self, name: str, reason: str) -> None:
        """Count an image, once over all processes. Raises `UserError` if the settings require that the run stops."""
        name, reason = _one_line(name), _one_line(reason)
        if self.on_error == "raise":
            raise UserError(f"data.on_error=raise: {name} cannot be read ({reason})")
        if name not in self._reasons:
            self.add(name, reason)
        if len(self._reasons) > self.max_bad_share * self.images:
            raise UserError(
                f"data.max_bad_share={self.max_bad_share:g}: {len(self._reasons)} of {self.images} images cannot be "
                f"read {self.examples()}; repair or remove them, or set data.max_bad_share=1 to continue without them"
            )

    def add(self, name: str, reason: str) -> None:
        """Count an image, without regard to the settings."""
        name, reason = _one_line(name), _one_line(reason)
        if self.path is None:
            self._reasons.setdefault(name, reason)
            return
        try:
            self._add_to_file(self.path, name, reason)
        except OSError as error:  # such as a full disk: only this process counts the image
            self._reasons[name] = reason
            warn(f"{self.path} cannot be written ({error.strerror or error}); it lacks {name} ({reason}).")

    def _add_to_file(self, path: Path, name: str, reason: str) -> None:
        with exclusive(path.with_name(f".{path.name}.lock")), open(path, "a+b") as file:
            line_is_complete = self._read_new_lines(file)
            if name not in self._reasons:
                line = f"{name}\t{reason}\n" if line_is_complete else f"\n{name}\t{reason}\n"
                file.write(line.encode("utf-8", "surrogateescape"))
                file.flush()
                self._reasons[name] = reason
                self._read_up_to = file.tell()

    def examples(self) -> str:
        """The first images with their reasons, and the file that lists all of them."""
        first = [f"{name}: {reason}" for name, reason in list(self._reasons.items())[:3]]
        examples = f"({'; '.join(first)}{'; …' if len(self._reasons) > len(first) else ''})"
        return examples if self.path is None else f"{examples}, see {self.path}"

    def _read_new_lines(self, file: IO[bytes]) -> bool:
        """Read the lines of other processes, while the lock is held; returns whether the last line is complete."""
        if file.seek(0, os.SEEK_END) < self._read_up_to:  # the file was truncated
            self._reasons, self._read_up_to = {}, 0
        file.seek(self._read_up_to)
        line = b"\n"
        for line in file:
            name, _, reason = line.decode("utf-8", "surrogateescape").rstrip("\n").partition("\t")
            if name:
                self._reasons[name] = reason
            self._read_up_to += len(line) if line.endswith(b"\n") else 0
        return line.endswith(b"\n")


class ReadableImages(Generic[T]):
    """Decoded images of a source. An unreadable one is replaced by the next readable one.

    The replacement is deterministic: position i falls back to i + 1, i + 2, …, and after the last one to 0. A bad image
    is counted in `bad` (which stops the run if the settings require it), and this process does not try it again.
    """

    def __init__(self, source: ImageSource, decode: Callable[[Content], T], *, bad: BadImages) -> None:
        self.source, self.decode, self.bad = source, decode, bad
        self._bad_positions: set[int] = set()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[T, int]:
        """The decoded image and its position in the source."""
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
