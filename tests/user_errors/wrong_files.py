"""Valid and invalid files."""

import io
import json
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tifffile
from PIL import Image

HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


def image(index: int = 0, form: str = "JPEG", *, side: int = 40) -> bytes:
    """An encoded picture of noise."""
    pixels = np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def tiff(array: np.ndarray, **options: Any) -> bytes:
    """An array as TIFF."""
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def gray(*values: float) -> np.ndarray:
    """Float pixels (40, 40): the first are `values`, the others 0.5."""
    pixels = np.full((40, 40), 0.5, np.float32)
    pixels.flat[: len(values)] = values
    return pixels


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims `side` x `side` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def touch(path: Path, content: bytes = b"") -> Path:
    """Create a file with this content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def photos(folder: Path, *, count: int = 16, classes: int = 2) -> Path:
    """Class folders a, b, … of good images."""
    for index in range(count):
        touch(folder / "abcdefgh"[index % classes] / f"{index}.jpg", image(index))
    return folder


def filled(folder: Path, content: bytes, *, name: str = "{}.jpg", count: int = 16) -> Path:
    """A flat folder of `count` equal files."""
    for index in range(count):
        touch(folder / name.format(index), content)
    return folder


def parquet(
    folder: Path,
    *,
    labels: list[Any] | None = None,
    name: str = "train.parquet",
    classes: list[str] | None = None,
    images: list[Any] | None = None,
) -> Path:
    """A folder of one file in the layout of Hugging Face."""
    folder.mkdir(parents=True, exist_ok=True)
    encoded = images if images is not None else [image(index) for index in range(16)]
    rows = [{"bytes": each, "path": None} for each in encoded]
    table = pa.table({"image": pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))})
    if labels is not None:
        table = table.append_column("label", pa.array(labels))
    if classes is not None:
        table = table.replace_schema_metadata({"classes": json.dumps(classes)})
    pq.write_table(table, folder / name)
    return folder


def zipped(path: Path, *, name: str = "{}.jpg") -> Path:
    """A zip of 16 good images."""
    with zipfile.ZipFile(path, "w") as file:
        for index in range(16):
            file.writestr(name.format(index), image(index))
    return path


def encrypted(path: Path) -> Path:
    """A zip whose entries are marked as encrypted."""
    content = bytearray(zipped(path).read_bytes())
    for mark, flags in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        at = content.find(mark)
        while at >= 0:
            content[at + flags] |= 1
            at = content.find(mark, at + 4)
    return touch(path, bytes(content))


def tarred(path: Path, *, name: str = "{:04d}.jpg", mode: str = "w") -> Path:
    """A tar of 16 good images."""
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for index in range(16):
            content = image(index)
            member = tarfile.TarInfo(name.format(index))
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def cut(path: Path, size: int | None = None) -> Path:
    """The first `size` bytes of a file, or half of it."""
    content = path.read_bytes()
    return touch(path, content[: len(content) // 2 if size is None else size])
