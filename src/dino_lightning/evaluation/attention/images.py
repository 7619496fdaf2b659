"""Whole images of any shape through a Vision Transformer: what its class token attends to, and where the objects are.

C channels, H, W pixels after resizing and cutting, heads, h and w patches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from dino_lightning.config import CropsConfig, DataConfig
from dino_lightning.data.bad_images import UNREADABLE, BadImages, why_unreadable
from dino_lightning.data.batches import WorkerError
from dino_lightning.data.crops.pil import Normalized
from dino_lightning.data.decode import Decoder
from dino_lightning.data.sources.base import ImageSource
from dino_lightning.errors import UserError
from dino_lightning.evaluation.context import Task
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.models.tokens import cls_attention, patch_size, patch_tokens
from dino_lightning.runtime.collectives import rank, world_size

F: Any = functional  # its annotations know tensors only


@runtime_checkable
class Masked(Protocol):
    """A source that knows where the objects are."""

    def mask(self, index: int, /) -> np.ndarray:
        """(H, W): 0 or False for background, a number for each object or True, 255 for void."""
        ...


@dataclass(frozen=True)
class Sample:
    """One image; None for one that cannot be read."""

    index: int
    image: Tensor | None
    """(C, H, W), normalized."""
    labels: Tensor | None
    """uint8 (H, W), where the source has masks."""


class WholeView:
    """The shorter side resized (bicubic), then cut to whole patches at the right and at the bottom."""

    def __init__(self, network: FrozenNetwork, *, size: int) -> None:
        self.size, self.patch = size, patch_size(network.backbone)
        self.finish = Normalized(CropsConfig(mean=network.mean, std=network.std))

    def image(self, image: Image.Image | Tensor) -> Tensor:
        """(C, H, W), normalized."""
        resized = F.resize(image, [self.size], InterpolationMode.BICUBIC)
        width, height = resized.size if isinstance(resized, Image.Image) else resized.shape[:0:-1]
        return self.finish(F.crop(resized, 0, 0, height - height % self.patch, width - width % self.patch))

    def labels(self, labels_HW: np.ndarray) -> Tensor:
        """The nearest pixels' labels, of the image's shape."""
        resized = F.resize(Image.fromarray(labels_HW.astype(np.uint8)), [self.size], InterpolationMode.NEAREST)
        found = torch.from_numpy(np.array(resized))
        height, width = found.shape
        return found[: height - height % self.patch, : width - width % self.patch]


class WholeImages(Dataset[Sample]):
    """The images of a source through a view, with their masks where it has them."""

    def __init__(self, source: ImageSource, view: WholeView, *, config: DataConfig | None, bad_images: Path) -> None:
        self.source, self.view = source, view
        # A benchmark has no keys for what to do with broken images.
        config = config or DataConfig(max_bad_share=1.0)
        decoder = Decoder(config)
        self.decode: Any = decoder.pil if config.channels in (1, 3) else decoder.pixels
        self.bad = BadImages(
            bad_images, images=len(source), on_error=config.on_error, max_bad_share=config.max_bad_share
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        try:
            image = self.decode(self.source.read(index))
            labels = self.source.mask(index) if isinstance(self.source, Masked) else None
        except UNREADABLE as error:
            self.bad.note(self.source.describe(index), why_unreadable(error))
            return Sample(index, None, None)
        return Sample(index, self.view.image(image), None if labels is None else self.view.labels(labels))

    def __getitems__(self, indices: list[int]) -> list[Sample] | WorkerError:
        try:
            return [self[index] for index in indices]
        except UserError as error:
            return WorkerError(str(error))


@dataclass(frozen=True)
class Seen:
    """An image and what the network sees in it, on the CPU."""

    index: int
    image: Tensor
    """(C, H, W), normalized."""
    attention: Tensor
    """(heads, h, w) float32."""
    labels: Tensor | None = None
    """uint8 (H, W)."""
    tokens: Tensor | None = None
    """(h, w, D) float32."""


@dataclass(frozen=True)
class Looker:
    """A network and how it looks at images."""

    task: Task
    batch_size: int
    tokens: bool = False
    """Whether patch tokens are wanted, too."""

    def look(self, samples: Sequence[Sample]) -> Iterator[Seen]:
        """Of the readable images, in their order; those of one shape pass through the network together."""
        backbone, runtime = cast(Any, self.task.network.backbone), self.task.runtime
        readable = [sample for sample in samples if sample.image is not None]
        start = 0
        while start < len(readable):
            shape = cast(Tensor, readable[start].image).shape
            stop = start + 1
            while stop < min(len(readable), start + self.batch_size):
                if cast(Tensor, readable[stop].image).shape != shape:
                    break
                stop += 1
            some = readable[start:stop]
            images = torch.stack([cast(Tensor, sample.image) for sample in some]).to(runtime.device)
            attention = runtime.forward(lambda batch: cls_attention(backbone, batch))(images).cpu()
            tokens = [None] * len(some)
            if self.tokens:
                tokens = list(runtime.forward(lambda batch: patch_tokens(backbone, batch))(images).cpu())
            for sample, heads, own in zip(some, attention, tokens, strict=True):
                yield Seen(sample.index, cast(Tensor, sample.image), heads, sample.labels, own)
            start = stop


def look_through(
    looker: Looker, images: WholeImages, *, what: str, every: Sequence[int] | None = None
) -> Iterator[Seen]:
    """This rank's share of the images, all of them by default. Broken ones are named and left out."""
    task = looker.task
    own = list(range(len(images)) if every is None else every)[rank() :: world_size()]
    batches = -(-len(own) // looker.batch_size)
    loader = DataLoader(
        images,
        batch_size=looker.batch_size,
        sampler=own,
        num_workers=min(task.num_workers, batches),
        collate_fn=_as_it_is,
        generator=torch.Generator().manual_seed(0),
    )
    with task.runtime.progress(what, total=len(own)) as advance:
        for batch in loader if own else ():
            if isinstance(batch, WorkerError):
                raise UserError(batch.message)
            yield from looker.look(batch)
            advance(len(batch))


def _as_it_is(batch: Any) -> Any:
    return batch
