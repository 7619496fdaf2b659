"""Full images of any shape through a Vision Transformer: the attention of its class token, and the objects in them.

C channels, H, W pixels after resizing and cropping, heads, h and w patches.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from dino_lightning.config import DataConfig
from dino_lightning.data.bad_images import UNREADABLE, why_unreadable
from dino_lightning.data.sources.base import ImageSource
from dino_lightning.evaluation.context import Task
from dino_lightning.evaluation.features.images import BatchLoader, SourceImages, normalization
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.models.tokens import cls_attention, patch_size, patch_tokens
from dino_lightning.runtime.collectives import rank, world_size

F: Any = functional  # its annotations accept only tensors


@runtime_checkable
class MaskSource(Protocol):
    """A source with the masks of objects."""

    def mask(self, index: int, /) -> np.ndarray:
        """(H, W): 0 or False for background, a number for each object or True, 255 for void."""
        ...


@dataclass(frozen=True)
class PreparedImage:
    """One image, ready for the network."""

    index: int
    image: Tensor
    """(C, H, W), normalized."""
    labels: Tensor | None = None
    """uint8 (H, W), if the source has masks."""


@dataclass(frozen=True, kw_only=True)
class ImageAttention(PreparedImage):
    """An image and its attention, on the CPU."""

    attention: Tensor
    """(heads, h, w) float32."""
    tokens: Tensor | None = None
    """(h, w, D) float32."""


class FullImageView:
    """Resizes the shorter side (bicubic), then crops the right and bottom edges to full patches."""

    def __init__(self, network: FrozenNetwork, *, size: int) -> None:
        self.size, self.patch = size, patch_size(network.backbone)
        self.normalize = normalization(network)

    def image(self, image: Image.Image | Tensor) -> Tensor:
        """(C, H, W), normalized."""
        resized = F.resize(image, [self.size], InterpolationMode.BICUBIC)
        width, height = resized.size if isinstance(resized, Image.Image) else resized.shape[:0:-1]
        return self.normalize(F.crop(resized, 0, 0, height - height % self.patch, width - width % self.patch))

    def labels(self, labels_HW: np.ndarray) -> Tensor:
        """Labels of the same shape as the image, by nearest neighbor."""
        resized = F.resize(Image.fromarray(labels_HW.astype(np.uint8)), [self.size], InterpolationMode.NEAREST)
        labels = torch.from_numpy(np.array(resized))
        height, width = labels.shape
        return labels[: height - height % self.patch, : width - width % self.patch]


class FullImages(SourceImages):
    """The images of a source through a view, with their masks if the source has them."""

    def __init__(self, task: Task, source: ImageSource, view: FullImageView) -> None:
        # The data of a benchmark has no keys for unreadable images: they are left out.
        config = task.data if isinstance(task.data, DataConfig) else DataConfig(max_bad_share=1)
        super().__init__(source, config=config, bad_images=task.output / "bad_images.txt")
        self.view = view

    def __getitem__(self, index: int) -> PreparedImage | None:
        image, labels = self.read(index), None
        if image is None:
            return None
        if isinstance(self.source, MaskSource):
            try:
                labels = self.view.labels(self.source.mask(index))
            except UNREADABLE as error:
                self.bad.note(self.source.describe(index), why_unreadable(error))
                return None
        return PreparedImage(index, self.view.image(image), labels)


@dataclass(frozen=True)
class AttentionExtractor:
    """Computes the attention of images, and with `tokens` also their patch tokens."""

    task: Task
    batch_size: int
    tokens: bool = False

    def extract(self, samples: Iterable[PreparedImage | None]) -> Iterator[ImageAttention]:
        """The attention of the readable images, in order. Successive images of one shape form a batch."""
        backbone, context = cast(Any, self.task.network.backbone), self.task.context
        attention_of = context.forward(lambda images: cls_attention(backbone, images))
        tokens_of = context.forward(lambda images: patch_tokens(backbone, images))
        readable = (sample for sample in samples if sample is not None)
        for _, same_shape in groupby(readable, key=lambda sample: sample.image.shape):
            while batch := list(islice(same_shape, self.batch_size)):
                images = torch.stack([sample.image for sample in batch]).to(context.device)
                attention = attention_of(images).cpu()
                tokens = tokens_of(images).cpu() if self.tokens else [None] * len(batch)
                for sample, heads, own in zip(batch, attention, tokens, strict=True):
                    yield ImageAttention(sample.index, sample.image, sample.labels, attention=heads, tokens=own)


def extract_attention(
    extractor: AttentionExtractor, images: FullImages, *, label: str, indices: Sequence[int] | None = None
) -> Iterator[ImageAttention]:
    """The attention of this rank's share of the images at `indices` (default: all); unreadable ones are left out."""
    task, size = extractor.task, extractor.batch_size
    local = list(range(len(images)) if indices is None else indices)[rank() :: world_size()]
    batches = [local[start : start + size] for start in range(0, len(local), size)]
    loader = BatchLoader(images, batches, num_workers=task.num_workers, device=torch.device("cpu"), collate=list)
    with task.context.progress(label, total=len(local)) as advance:
        for batch in loader:
            yield from extractor.extract(batch)
            advance(len(batch))
