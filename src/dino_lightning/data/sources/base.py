"""The interface of image sources, and subsets of a source.

A source returns images as they are stored (the bytes of a file, or an array of pixels) with their labels; `data.decode`
decodes them. Opening a source raises `UserError` for wrong settings. Reading an image raises `OSError` if its file is
missing, and `describe` names that image.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

Content: TypeAlias = bytes | np.ndarray
"""An encoded image, or pixels (H, W) or (H, W, C) of any number type."""


@runtime_checkable
class ImageSource(Protocol):
    """Images with random access. Sources are pickled for loader processes.

    Data that grows with the number of images must be in arrays, not in Python objects: a forked loader process would
    copy the objects when it changes their reference counts.
    """

    @property
    def classes(self) -> list[str] | None:
        """Class names, indexed by label; None without labels."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """Labels (n,) int64, -1 for an unlabeled image; None without labels."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int, /) -> Content:
        """The image as it is stored."""
        ...

    def describe(self, index: int, /) -> str:
        """Name of the image for messages."""
        ...

    def fingerprint(self) -> str:
        """A short text that changes if the images change; may stat every file."""
        ...


class Sample(NamedTuple):
    """One image of a stream."""

    content: Content | None
    """None if the sample has no image."""
    label: int
    """-1 if it is unlabeled."""
    name: str
    """Name of the image for messages."""


@runtime_checkable
class ImageStream(Protocol):
    """Images in shards that are read sequentially. Streams are pickled for loader processes."""

    @property
    def classes(self) -> list[str] | None:
        """Class names, indexed by label; None without labels."""
        ...

    @property
    def images(self) -> int:
        """Images per epoch: the size of all shards, or the number that the user set."""
        ...

    @property
    def shards(self) -> int:
        """Number of shards."""
        ...

    def read_shard(self, shard: int, /, *, start: int = 0) -> Iterator[Sample]:
        """The samples of a shard from number `start` on, in stored order."""
        ...


@dataclass(frozen=True)
class Splits:
    """The opened images. `val` contains the k-NN queries; None without labels or if none are held out.

    A labeled training set may contain unlabeled images, such as in `stl10`: they train, but are not in the k-NN bank.
    """

    train: ImageSource | ImageStream
    val: ImageSource | None
    remark: str | None
    """One line about how the images were read, for the user."""


class Subset:
    """The images `indices` (m,) of another source."""

    def __init__(self, source: ImageSource, *, indices: np.ndarray):
        self.source, self.indices, self.classes = source, indices, source.classes
        self.labels = None if source.labels is None else source.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Content:
        """The image as it is stored."""
        return self.source.read(int(self.indices[index]))

    def describe(self, index: int) -> str:
        """The source's name of the image."""
        return self.source.describe(int(self.indices[index]))

    def fingerprint(self) -> str:
        """Digest of the source's fingerprint and the indices."""
        return content_digest(self.source.fingerprint().encode(), self.indices.tobytes())


class FirstImages:
    """The first images of a stream, in memory, with random access."""

    def __init__(self, stream: ImageStream, *, images: int):
        self.samples: list[Sample] = []
        self.without_image: str | None = None
        """Name of the first sample that has no image."""
        for sample in chain.from_iterable(stream.read_shard(shard) for shard in range(stream.shards)):
            if sample.content is None:
                self.without_image = self.without_image or sample.name
            else:
                self.samples.append(sample)
                if len(self.samples) == images:
                    break
        self.classes = stream.classes
        labels = np.array([sample.label for sample in self.samples], dtype=np.int64)
        self.labels = labels if (labels >= 0).any() else None

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> Content:
        """The image as it is stored."""
        content = self.samples[index].content
        assert content is not None
        return content

    def describe(self, index: int) -> str:
        """The stream's name of the image."""
        return self.samples[index].name

    def fingerprint(self) -> str:
        """Digest of the names."""
        return content_digest(*(sample.name.encode() for sample in self.samples))


def content_digest(*parts: bytes) -> str:
    """A short digest of the parts, for `fingerprint`."""
    return hashlib.blake2b(b"".join(hashlib.blake2b(part).digest() for part in parts), digest_size=12).hexdigest()


def evenly_spaced(total: int, count: int) -> list[int]:
    """At most `count` different indices below `total`, from the first to the last."""
    return np.unique(np.linspace(0, total - 1, count).astype(int)).tolist()


def join_remarks(*remarks: str | None) -> str | None:
    """The remarks in one line; None if there are none."""
    return "; ".join(filter(None, remarks)) or None


def hold_out(opened: Splits, *, share: float, seed: int) -> Splits:
    """Move `share` of the labeled training images to `val`, and say so in the remark."""
    source = opened.train
    assert isinstance(source, ImageSource)
    assert source.labels is not None
    held = held_out(source.labels, share=share, seed=seed)
    if not held.any():
        remark = join_remarks(opened.remark, "no validation split and nothing held out: no k-NN evaluation")
        return Splits(source, None, remark)
    remark = f"no validation split: {share:.0%} of the images ({held.sum()}) are held out as k-NN queries"
    train, val = (Subset(source, indices=np.flatnonzero(mask)) for mask in (~held, held))
    return Splits(train, val, join_remarks(opened.remark, remark))


def held_out(labels: np.ndarray, *, share: float, seed: int) -> np.ndarray:
    """Mask (n,) of a stratified sample: `share` of each class, but at least one image, and never the whole class.

    Images labeled -1 are never held out. The sample depends only on `labels`, `share` and `seed`, so all processes
    select the same images.
    """
    generator = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    if not share:
        return held
    # Sorted once: searching for each of 200,000 classes among four million images would take hours.
    by_label = np.flatnonzero(labels >= 0)
    by_label = by_label[np.argsort(labels[by_label], kind="stable")]
    for members in np.split(by_label, np.flatnonzero(np.diff(labels[by_label])) + 1):
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held[generator.permutation(members)[: max(count, 0)]] = True
    return held
