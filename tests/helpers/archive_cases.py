"""Zip and tar files of images, for the tests of archives."""

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from source_cases import png

from dino_lightning.config import ArchiveData
from dino_lightning.data.sources import open_sources
from dino_lightning.data.sources.base import Splits

LONG_NAME = f"{'a long folder name ' * 8}/{'and a long file name ' * 8}.png"
Files = dict[str, bytes]


def images(*names: str) -> Files:
    """Name -> content of distinct images, padded to different lengths."""
    return {name: png(number) + bytes(37 * number) for number, name in enumerate(names)}


def tar_bytes(files: Files, *, form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zip_bytes(files: Files, *, method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return buffer.getvalue()


def zip_with_extra_fields(files: Files) -> bytes:
    """A zip whose entries have an extra field in the local header, but not in the central directory."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)
            entry.extra = b"UT\x05\x00\x01abcd"
            packed.writestr(entry, content)
        for entry in packed.infolist():
            entry.extra = b""
    return buffer.getvalue()


def zip_with_flags(files: Files, *, flip: int) -> bytes:
    """A zip with one entry whose flags differ by `flip`, in the local header and in the central directory."""
    content = bytearray(zip_bytes(files))
    for magic, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        begin = content.index(magic) + offset
        flags = int.from_bytes(content[begin : begin + 2], "little") ^ flip
        content[begin : begin + 2] = flags.to_bytes(2, "little")
    return bytes(content)


FORMS: dict[str, tuple[str, Callable[[Files], bytes]]] = {
    "stored": (".zip", zip_bytes),
    "deflated": (".zip", lambda files: zip_bytes(files, method=zipfile.ZIP_DEFLATED)),
    "extra": (".zip", zip_with_extra_fields),
    "prefixed": (".ZIP", lambda files: b"#!/bin/sh\n" + zip_bytes(files)),
    "pax": (".tar", tar_bytes),
    "gnu": (".tar", lambda files: tar_bytes(files, form=tarfile.GNU_FORMAT)),
}


def opened(path: Path, **options) -> Splits:
    return open_sources(ArchiveData(path=str(path), **{"holdout": 0, **options}), seed=0)


def contents(source) -> Files:
    return {source.describe(i): source.read(i) for i in range(len(source))}


def by_class(source) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for i, label in enumerate(source.labels.tolist()):
        names.setdefault(source.classes[label], []).append(os.path.basename(source.describe(i)))
    return names
