"""Rows: archives, streams of shards, data sets by name."""

import tarfile
from collections.abc import Callable
from pathlib import Path

from wrong_files import HTML, cut, encrypted, photos, tarred, touch, zipped
from wrong_inputs import Wrong

Make = Callable[[Path], list[str]]


def archive(make: Callable[[Path], Path]) -> Make:
    """`data=archive` of what is made."""
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
    """The first images of a tar, without what marks its end."""
    with tarfile.open(tarred(path / "a.tar")) as file:
        return cut(path / "a.tar", file.getmembers()[8].offset)


def damaged_cifar(path: Path) -> list[str]:
    touch(path / "cifar-10-batches-py" / "data_batch_1", HTML)
    return ["data=cifar10", f"data.path={path}", "data.download=false"]


EXPECTED = "expected samples with an image that data.image_keys or data.image_column names."
NO_IMAGE = "data: no image was found in the stream"
CUT_OFF = f"{NO_IMAGE} (a.tar (truncated or unreadable after 0 samples: …) has none); {EXPECTED}"
AGAIN = "copy or download it again"

ROWS = [
    Wrong(
        "a zip that is cut off",
        archive(lambda path: cut(zipped(path / "a.zip"))),
        f"data.path: 'DIR/a.zip' is not a zip file that can be read (File is not a zip file); {AGAIN}",
    ),
    Wrong(
        "a tar that is cut off within an image",
        archive(lambda path: cut(tarred(path / "a.tar"), 5000)),
        f"data.path: 'DIR/a.tar' is not a tar file that can be read (unexpected end of data); {AGAIN}",
    ),
    Wrong(
        "a tar that is cut off between two images",
        archive(cut_between),
        f"data.path: 'DIR/a.tar' is not a tar file that can be read (cut off at byte …); {AGAIN}",
    ),
    Wrong(
        "a compressed tar",
        archive(lambda path: tarred(path / "a.tar.gz", mode="w:gz")),
        "data.path: 'DIR/a.tar.gz' is compressed, so it cannot be read from the middle; decompress it (gunzip)",
    ),
    Wrong(
        "an encrypted zip",
        archive(lambda path: encrypted(path / "a.zip")),
        "data.path: 'DIR/a.zip' is encrypted; unpack it with its password and take data=folder",
    ),
    Wrong(
        "a zip without images",
        archive(lambda path: zipped(path / "a.zip", name="{}.txt")),
        "data.path: 'DIR/a.zip' holds no image, neither in folders nor in tar files inside",
    ),
    Wrong(
        "a web page saved as .zip",
        archive(lambda path: touch(path / "a.zip", HTML)),
        f"data.path: 'DIR/a.zip' is not a zip file that can be read (File is not a zip file); {AGAIN}",
    ),
    Wrong(
        "a tar of zero bytes",
        archive(lambda path: touch(path / "a.tar")),
        f"data.path: 'DIR/a.tar' is not a tar file that can be read (empty file); {AGAIN}",
    ),
    Wrong(
        "a folder without archives",
        archive(lambda path: photos(path / "in")),
        "data.path: 'DIR/in' holds no .zip or .tar; for image files take data=folder",
    ),
    Wrong(
        "braces of a shard pattern that do not close",
        shards("DIR/a-{000..003.tar"),
        "data.shards=DIR/a-{000..003.tar is not a pattern of paths or URLs (Unbalanced braces: 'DIR/a-{000..003.tar')",
    ),
    Wrong(
        "braces without an end number",
        shards("DIR/a-{000..}.tar"),
        "data.shards=DIR/a-{000..}.tar: 'DIR/a-{000..}.tar' does not exist, no 'a-{000..}.tar' in 'DIR'; …",
    ),
    Wrong(
        "braces that count one shard too many",
        lambda path: shards(f"{tarred(path / 'a-0.tar').with_name('a-{0..1}.tar')}")(path),
        "data.shards=DIR/a-{0..1}.tar: 'DIR/a-1.tar' does not exist, no 'a-1.tar' in 'DIR'; did you mean 'a-0.tar'?",
    ),
    Wrong(
        "a folder without shards",
        lambda path: shards(str(photos(path / "in")))(path),
        "data.shards=DIR/in: the folder 'DIR/in' holds no *.tar",
    ),
    Wrong(
        "a scheme that nothing opens",
        shards("s4://bucket/a.tar"),
        "data.shards=s4://bucket/a.tar: 's4' cannot be opened, choose one of …; a command that prints the shard can be "
        "given as 'pipe:COMMAND'",
    ),
    Wrong(
        "a shard that is cut off in its first image",
        shard(lambda file: cut(tarred(file), 1000)),
        CUT_OFF,
    ),
    Wrong(
        "a web page saved as a shard",
        shard(lambda file: touch(file, HTML)),
        CUT_OFF,
    ),
    Wrong(
        "a shard of zero bytes",
        shard(touch),
        CUT_OFF,
    ),
    Wrong(
        "a shard of text files",
        shard(lambda file: tarred(file, name="{}.txt")),
        f"data: no image was found in the stream (a.tar 0 has none); {EXPECTED}",
    ),
    Wrong(
        "a stream of no images",
        shard(tarred, "data.images=0"),
        "data.images=0: expected at least 1.",
    ),
    Wrong(
        "method=supervised on a stream",
        shard(tarred, "method=supervised"),
        "method=supervised reads labels by index, which streams do not support; choose another method, or "
        "data=folder, parquet, listing or archive.",
    ),
    Wrong(
        "a data set of a hub that does not exist",
        lambda path: ["data=huggingface", f"data.name={path}/none"],
        "data.name=DIR/none is no folder of images and was not found on the Hugging Face Hub (…); give another name, "
        "or the network to reach it",
    ),
    Wrong(
        "CIFAR-10 that is not there, with data.download=false",
        lambda path: ["data=cifar10", f"data.path={path}", "data.download=false"],
        "data.path=DIR holds no complete 'cifar-10-batches-py' of cifar10; give the folder that holds it or set "
        "data.download=true",
    ),
    Wrong(
        "a damaged CIFAR-10, with data.download=false",
        damaged_cifar,
        "data.path=DIR holds no complete 'cifar-10-batches-py' of cifar10; give the folder that holds it or set "
        "data.download=true",
    ),
]
