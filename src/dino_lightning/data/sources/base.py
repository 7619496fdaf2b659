"""What a source of images is, and what it can be cut into.

A source gives an image as it is stored, a file's bytes or an array of pixels, and its label; `data.decode` makes pixels
of it. Wrong settings raise `UserError` when a source is opened. A file that is not there raises `OSError` when it is
read, and `describe` says which image it was.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

Content: TypeAlias = bytes | np.ndarray
"""An encoded image, or pixels (H, W) or (H, W, C) of any number type."""


@runtime_checkable
class ImageSource(Protocol):
    """Images that are counted and read by index, picklable for loader processes.

    A loader process must not copy it: what grows with the number of images stands in arrays, not in Python objects.
    """

    @property
    def classes(self) -> list[str] | None:
        """Class names, the label being the index; None without labels."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """Labels (n,) int64, -1 for a single image without one; None without labels."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int, /) -> Content:
        """The image as it is stored."""
        ...

    def describe(self, index: int, /) -> str:
        """How to name the image to a person."""
        ...

    def fingerprint(self) -> str:
        """A short text that changes when the images change; may look at every file."""
        ...


class Sample(NamedTuple):
    """One image of a stream."""

    content: Content | None
    """None where the sample has no image."""
    label: int
    """-1 where there is none."""
    name: str
    """How to name the image to a person."""


@runtime_checkable
class ImageStream(Protocol):
    """Images that can only be read one after another, in shards; picklable for loader processes."""

    @property
    def classes(self) -> list[str] | None:
        """Class names, the label being the index; None without labels."""
        ...

    @property
    def images(self) -> int:
        """Images of an epoch: of all shards, or the number that the user gave."""
        ...

    @property
    def shards(self) -> int:
        """Number of pieces that can be read on their own."""
        ...

    def read_shard(self, shard: int, /, *, start: int = 0) -> Iterator[Sample]:
        """The samples of a shard from number `start` on, in the order in which they are stored."""
        ...


@dataclass(frozen=True)
class Splits:
    """The opened images: `val` holds the k-NN queries, None where there are no labels or none were kept.

    Single training images may have the label -1 (`stl10`): they train, but a k-NN bank leaves them out.
    """

    train: ImageSource | ImageStream
    val: ImageSource | None
    remark: str | None
    """One line on how the images were read, where a person should know."""


class Subset:
    """The images `indices` (m,) of another source."""

    def __init__(self, source: ImageSource, *, indices: np.ndarray):
        self.source = source
        self.indices = indices
        self.classes = source.classes
        self.labels = None if source.labels is None else source.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Content:
        """The other source's image."""
        return self.source.read(int(self.indices[index]))

    def describe(self, index: int) -> str:
        """The other source's name of the image."""
        return self.source.describe(int(self.indices[index]))

    def fingerprint(self) -> str:
        """The other source's, and which images."""
        return content_digest(self.source.fingerprint().encode(), self.indices.tobytes())


class FirstImages:
    """The first images of a stream, kept in memory to be read by index."""

    def __init__(self, stream: ImageStream, *, images: int):
        every = chain.from_iterable(stream.read_shard(shard) for shard in range(stream.shards))
        self.why_empty = "its shards have no samples"
        """Of the first sample without an image, where no other was found."""
        self.samples = list(islice(self._with_images(every), images))
        self.classes = stream.classes
        labels = np.array([sample.label for sample in self.samples], dtype=np.int64)
        self.labels = labels if (labels >= 0).any() else None

    def _with_images(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        first = None
        for sample in samples:
            if sample.content is not None:
                yield sample
            elif first is None:
                first = sample.name
                self.why_empty = f"{first} has none"

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
        """Of the names."""
        return content_digest(*(sample.name.encode() for sample in self.samples))


def content_digest(*parts: bytes) -> str:
    """A short text that stands for the parts, for `fingerprint`."""
    return hashlib.blake2b(b"".join(hashlib.blake2b(part).digest() for part in parts), digest_size=12).hexdigest()


def hold_out(opened: Splits, *, share: float, seed: int) -> Splits:
    """Move `share` of the labeled training images to `val`; the notice says so."""
    source = opened.train
    assert isinstance(source, ImageSource)
    assert source.labels is not None
    held = held_out(source.labels, share=share, seed=seed)
    before = f"{opened.remark}; " if opened.remark else ""
    if not held.any():
        return Splits(source, None, f"{before}no validation split and nothing held out: no k-NN evaluation")
    notice = f"{before}no validation split: {share:.0%} of the images ({held.sum()}) are held out as k-NN queries"
    train, val = (Subset(source, indices=np.flatnonzero(mask)) for mask in (~held, held))
    return Splits(train, val, notice)


def held_out(labels: np.ndarray, *, share: float, seed: int) -> np.ndarray:
    """Mask (n,) of a stratified draw: `share` of each class, of two images or more at least one held and one left.

    Images labeled -1 stay. The draw depends on `labels`, `share` and `seed` only, so every process agrees.
    """
    generator = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    if not share:
        return held
    # Sorted once: to look for each of 200,000 classes among four million images would take hours.
    by_label = np.flatnonzero(labels >= 0)
    by_label = by_label[np.argsort(labels[by_label], kind="stable")]
    for members in np.split(by_label, np.flatnonzero(np.diff(labels[by_label])) + 1):
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held[generator.permutation(members)[: max(count, 0)]] = True
    return held
