"""Rows: archives, streams of shards, named datasets."""

import tarfile
from collections.abc import Callable
from pathlib import Path

from wrong_files import HTML, cut, encrypted, photos, tarred, touch, zipped
from wrong_inputs import Wrong

Make = Callable[[Path], list[str]]


def archive(make: Callable[[Path], Path]) -> Make:
    """`data=archive` with the created file."""
    return lambda path: ["data=archive", f"data.path={make(path)}"]


def shards(pattern: str, *words: str) -> Make:
    """`data=webdataset` of a pattern in which `DIR` is the folder."""
    return lambda path: [
        "data=webdataset",
        f"data.shards={pattern.replace('DIR', str(path))}",
        "data.images=16",
        *words,
    ]


def shard(make: Callable[[Path], Path], *words: str) -> Make:
    """`data=webdataset` of one shard."""
    return lambda path: ["data=webdataset", f"data.shards={make(path / 'a.tar')}", "data.images=16", *words]


def cut_between(path: Path) -> Path:
    """The first images of a tar, without its end marker."""
    with tarfile.open(tarred(path / "a.tar")) as file:
        return cut(path / "a.tar", file.getmembers()[8].offset)


def damaged_cifar(path: Path) -> list[str]:
    touch(path / "cifar-10-batches-py" / "data_batch_1", HTML)
    return ["data=cifar10", f"data.path={path}", "data.download=false"]


EXPECTED = "expected samples with an image in data.image_keys or data.image_column."
NO_IMAGE = "data: the stream contains no image"
CUT_OFF = f"{NO_IMAGE} (a.tar (truncated or unreadable after 0 samples: …) has none); {EXPECTED}"
AGAIN = "copy or download it again"

ROWS = [
    Wrong(
        "a truncated zip",
        archive(lambda path: cut(zipped(path / "a.zip"))),
        f"data.path: 'DIR/a.zip' is not a readable zip file (File is not a zip file); {AGAIN}",
    ),
    Wrong(
        "a tar truncated within an image",
        archive(lambda path: cut(tarred(path / "a.tar"), 5000)),
        f"data.path: 'DIR/a.tar' is not a readable tar file (unexpected end of data); {AGAIN}",
    ),
    Wrong(
        "a tar truncated between two images",
        archive(cut_between),
        f"data.path: 'DIR/a.tar' is not a readable tar file (truncated at byte …); {AGAIN}",
    ),
    Wrong(
        "a compressed tar",
        archive(lambda path: tarred(path / "a.tar.gz", mode="w:gz")),
        "data.path: 'DIR/a.tar.gz' is compressed, so single images cannot be read from it; decompress it (gunzip)",
    ),
    Wrong(
        "an encrypted zip",
        archive(lambda path: encrypted(path / "a.zip")),
        "data.path: 'DIR/a.zip' is encrypted; extract it with its password and use data=folder",
    ),
    Wrong(
        "a zip without images",
        archive(lambda path: zipped(path / "a.zip", name="{}.txt")),
        "data.path: 'DIR/a.zip' contains no image, neither in folders nor in tar files inside it",
    ),
    Wrong(
        "a web page saved as .zip",
        archive(lambda path: touch(path / "a.zip", HTML)),
        f"data.path: 'DIR/a.zip' is not a readable zip file (File is not a zip file); {AGAIN}",
    ),
    Wrong(
        "a tar of zero bytes",
        archive(lambda path: touch(path / "a.tar")),
        f"data.path: 'DIR/a.tar' is not a readable tar file (empty file); {AGAIN}",
    ),
    Wrong(
        "a folder without archives",
        archive(lambda path: photos(path / "in")),
        "data.path: 'DIR/in' contains no .zip or .tar; for image files use data=folder",
    ),
    Wrong(
        "unbalanced braces in a shard pattern",
        shards("DIR/a-{000..003.tar"),
        "data.shards=DIR/a-{000..003.tar is not a pattern of paths or URLs (Unbalanced braces: 'DIR/a-{000..003.tar')",
    ),
    Wrong(
        "a shard range without an end",
        shards("DIR/a-{000..}.tar"),
        "data.shards=DIR/a-{000..}.tar: 'DIR/a-{000..}.tar' does not exist, no 'a-{000..}.tar' in 'DIR'; …",
    ),
    Wrong(
        "a shard range with one shard too many",
        lambda path: shards(f"{tarred(path / 'a-0.tar').with_name('a-{0..1}.tar')}")(path),
        "data.shards=DIR/a-{0..1}.tar: 'DIR/a-1.tar' does not exist, no 'a-1.tar' in 'DIR'; did you mean 'a-0.tar'?",
    ),
    Wrong(
        "a folder without shards",
        lambda path: shards(str(photos(path / "in")))(path),
        "data.shards=DIR/in: the folder 'DIR/in' contains no *.tar",
    ),
    Wrong(
        "an unsupported URL scheme",
        shards("s4://bucket/a.tar"),
        "data.shards=s4://bucket/a.tar: the scheme 's4' is not supported; choose one of …, or 'pipe:COMMAND' with a "
        "command that prints the shard",
    ),
    Wrong(
        "a shard truncated in its first image",
        shard(lambda file: cut(tarred(file), 1000)),
        CUT_OFF,
    ),
    Wrong(
        "a web page saved as a shard",
        shard(lambda file: touch(file, HTML)),
        CUT_OFF,
    ),
    Wrong(
        "an empty shard",
        shard(touch),
        CUT_OFF,
    ),
    Wrong(
        "a shard with text files",
        shard(lambda file: tarred(file, name="{}.txt")),
        f"data: the stream contains no image (a.tar 0 has none); {EXPECTED}",
    ),
    Wrong(
        "a stream without images",
        shard(tarred, "data.images=0"),
        "data.images=0: expected at least 1.",
    ),
    Wrong(
        "method=supervised with a stream",
        shard(tarred, "method=supervised"),
        "method=supervised reads labels by index, which streams do not support; choose another method, or "
        "data=folder, parquet, listing or archive.",
    ),
    Wrong(
        "a Hugging Face dataset that does not exist",
        lambda path: ["data=huggingface", f"data.name={path}/none"],
        "data.name=DIR/none is not a folder of images and was not found on the Hugging Face Hub (…); check the name "
        "and the network connection",
    ),
    Wrong(
        "missing CIFAR-10, with data.download=false",
        lambda path: ["data=cifar10", f"data.path={path}", "data.download=false"],
        "data.path=DIR contains no complete 'cifar-10-batches-py' of cifar10; choose the folder that contains "
        "it, or set data.download=true",
    ),
    Wrong(
        "a damaged CIFAR-10, with data.download=false",
        damaged_cifar,
        "data.path=DIR contains no complete 'cifar-10-batches-py' of cifar10; choose the folder that contains "
        "it, or set data.download=true",
    ),
]
