"""Fuzz the readers of archives: `python tests/fuzz/fuzz_archives.py -max_total_time=640 -rss_limit_mb=4096`.

The first byte of an input selects the reader (zip, tar, WebDataset shard, Parquet file), the other bytes are the file.
In half of the inputs, the checksums of tar headers are corrected; otherwise, the reader would reject nearly all
mutations.
"""

# ruff: noqa: E402 - instrumented modules must be imported inside the `with` statement
import io
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parent)]

import harness

FOLDER = harness.scratch("archives")
os.environ["HF_DATASETS_CACHE"] = str(FOLDER / "datasets")
os.environ["HF_DATASETS_OFFLINE"] = "1"

with atheris.instrument_imports(include=["tarfile", "zipfile", "webdataset", "dino_lightning.data"]):
    import tarfile
    import zipfile

    from dino_lightning.data.bad_images import UNREADABLE, why_unreadable
    from dino_lightning.data.sources import archive, open_sources, parquet, webdataset

import datasets
import decode_cases as cases
import pyarrow as pa
import pyarrow.parquet as pq

from dino_lightning.config import ArchiveData, DataConfig, ParquetData, WebDatasetData
from dino_lightning.errors import UserError

ZIP, TAR, SHARD, PARQUET, CORRECT = 0, 1, 2, 3, 4
CONFIGS: list[DataConfig] = [
    ArchiveData(path=str(FOLDER / "images.zip"), cache_dir=str(FOLDER / "cache")),
    ArchiveData(path=str(FOLDER / "images.tar"), cache_dir=str(FOLDER / "cache")),
    WebDatasetData(shards=str(FOLDER / "shard.tar"), images=100),
    ParquetData(path=str(FOLDER / "train.parquet")),
]
FILES = [FOLDER / name for name in ("images.zip", "images.tar", "shard.tar", "train.parquet")]
MAX_IMAGES = 50
"""Number of images of a source that are read."""
BLOCK = 512


def members() -> dict[str, bytes]:
    """Two classes with two small images each, and a text file."""
    gray = cases.photo("L").resize((9, 7))
    images = {f"{name}/{i}.png": cases.encoded(gray.rotate(90 * i)) for name in ("cat", "dog") for i in range(2)}
    return {**images, "readme.txt": b"nothing"}


def zipped(method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as packed:
        for name, content in members().items():
            packed.writestr(name, content)
    return file.getvalue()


def tarred(files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as packed:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("cat/link.png")
        link.type, link.linkname = tarfile.LNKTYPE, "cat/0.png"
        packed.addfile(link)
    return file.getvalue()


def parquet_file() -> bytes:
    rows = [{"bytes": content, "path": None} for name, content in members().items() if name.endswith(".png")]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    table = pa.table({"image": rows, "label": [0, 0, 1, 1]}).cast(features.arrow_schema)
    file = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(features.arrow_schema.metadata), file)
    return file.getvalue()


def seeds() -> Iterator[bytes]:
    """An archive of each kind."""
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        yield bytes([ZIP]) + zipped(method)
    shard = {"0.png": members()["cat/0.png"], "0.cls": b"1", "1.jpg": b"no image", "1.cls": b"x"}
    shard |= {"2.npy": cases.npy(cases.values(3)[:5, :4]), "2.json": b"{}"}
    for correct in (0, CORRECT):
        for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
            files = members() | {"a" * 60 + "/" + "b" * 90 + ".png": b"long"}
            yield bytes([TAR + correct]) + tarred(files, form)
            yield bytes([SHARD + correct]) + tarred(shard, form)
        yield bytes([TAR + correct]) + tarred({"cat.tar": tarred(members()), "dog.tar": tarred(members())})
    yield bytes([PARQUET]) + parquet_file()


def with_correct_checksums(content: bytes) -> bytes:
    """A tar with correct checksums in all blocks that look like a header."""
    blocks = bytearray(content)
    for at in range(0, len(content) - BLOCK + 1, BLOCK):
        if blocks[at + 257 : at + 262] == b"ustar":
            blocks[at + 148 : at + 156] = b" " * 8
            blocks[at + 148 : at + 156] = b"%06o\0 " % sum(blocks[at : at + BLOCK])
    return bytes(blocks)


def read_all(data: bytes) -> None:
    """Open the source, and read and describe its images as the loader does."""
    kind, content = data[0] & 3, data[1:]
    if data[0] & CORRECT and kind in (TAR, SHARD):
        content = with_correct_checksums(content)
    FILES[kind].write_bytes(content)
    source = open_sources(CONFIGS[kind], seed=0).train
    decoder = cases.decoder()
    if kind == SHARD:
        for sample in source.read_shard(0):  # type: ignore[union-attr]
            assert "\n" not in sample.name
            if sample.content is not None:
                attempt(lambda sample=sample: decoder.pixels(sample.content))
        return
    for index in range(min(MAX_IMAGES, len(source))):  # type: ignore[arg-type]
        assert source.describe(index)  # type: ignore[union-attr]
        attempt(lambda index=index: decoder.pixels(source.read(index)))  # type: ignore[union-attr]


def attempt(read: object) -> None:
    """Read an image; only errors that mean an unreadable image may be raised."""
    try:
        read()  # type: ignore[operator]
    except UNREADABLE as error:
        reason = why_unreadable(error)
        if "\n" in reason:
            raise AssertionError(reason) from error


def main() -> None:
    for reader in (archive, parquet, webdataset):
        assert reader.__doc__  # use the imports above, which are instrumented
    for seed in seeds():
        read_all(seed)
    findings = harness.Findings(harness.folder("archives") / "findings", harness.Guard(allowed=FOLDER))

    def target(data: bytes) -> None:
        if not data or (data[0] & 3 == PARQUET and random.random() > 0.2):  # a hundred times slower than the others
            return
        findings.run(data, read_all, (UserError,))
        if findings.executions % 500 == 0:
            shutil.rmtree(FOLDER / "datasets", ignore_errors=True)

    harness.fuzz("archives", seeds(), target)


if __name__ == "__main__":
    main()
