"""WebDataset shards of images."""

import io
import tarfile
from pathlib import Path
from typing import Any

import webdataset
from source_cases import png

from dino_lightning.config import WebDatasetData
from dino_lightning.data.sources import open_sources
from dino_lightning.data.sources.webdataset import WebDatasetImages

Members = list[tuple[str, bytes]]


MEMBERS: Members = [(f"{number}.png", bytes([number]) * 700) for number in range(5)]
"""Members that take 1536 bytes each in a tar."""


def write_tar(path: Path, members: Members, *, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder: Path, *sizes: int) -> str:
    """Write shards of the pictures 0, 1, … with labels, using the library; returns their pattern."""
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
