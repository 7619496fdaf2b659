"""Features of many images, cached on disk in blocks, so that an interrupted evaluation can resume.

    features_MD, labels_M, indices_M = cached_features(
        task, task.context.forward(task.network.backbone), images, label="training images", kind="cls", batch_size=256)

The images are divided into blocks of `BLOCK`, which are dealt to the ranks in turn. A finished block is one safetensors
file in `task.cache / KEY /`; KEY is a digest of everything that the features depend on. A later run reads the existing
blocks and extracts the others. A batch never spans two blocks, so neither the number of ranks nor an interruption
changes a bit of the features.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dino_lightning.data.sources.base import ImageSource, content_digest
from dino_lightning.errors import UserError
from dino_lightning.evaluation.context import Task
from dino_lightning.evaluation.features.extract import extract_batches, gather_by_index, join_parts
from dino_lightning.evaluation.features.images import BROKEN, ViewedImages
from dino_lightning.runtime.collectives import rank, world_size
from dino_lightning.runtime.files import atomic_file

BLOCK = 1024
"""Images per block: the most that an interruption costs each device."""
FORMAT = "1"
"""Increase this when the same weights and images give other features than before."""

Block = tuple[Tensor, Tensor]
"""Features (n, D) float32 and labels (n,) int64."""

_fingerprints: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def cached_features(
    task: Task,
    forward: Callable[[Tensor], Tensor],
    images: ViewedImages,
    *,
    label: str,
    kind: str,
    batch_size: int,
    indices: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features (M, D) float32, labels (M,) and indices (M,) of the readable images, on every rank, by ascending index.

    `indices` selects images (default: all), each at most once. `label` is that of the progress bar. `kind` names what
    `forward` computes and, for a view without `config`, what the view does. Cached features are identified by weights,
    kind, view, source, indices and precision. A batch has `batch_size` images, at most `BLOCK`.
    """
    selected = list(range(len(images))) if indices is None else sorted(int(index) for index in indices)
    cache = None
    if task.cache is not None:
        key = feature_key(task, images, kind=kind, indices=selected) if task.context.is_main else ""
        cache = BlockCache(task.cache / task.context.fabric.broadcast(key), say=task.context.say)
    starts = range(0, len(selected), BLOCK)[rank() :: world_size()]
    local = {start // BLOCK: selected[start : start + BLOCK] for start in starts}
    with task.context.progress(label, total=sum(map(len, local.values()))) as advance:
        blocks: dict[int, Block] = {}
        for number, block in local.items():
            content = cache.load(number, block) if cache else None
            if content is not None:
                blocks[number] = content
                for position in (content[1] == BROKEN).nonzero().flatten().tolist():
                    name = images.source.describe(block[position])
                    images.bad.note(name, "it could not be read when the features of its block were cached")
                advance(len(block))
        missing = {number: block for number, block in local.items() if number not in blocks}
        for number, content in _extract(task, forward, images, missing, batch_size=batch_size, advance=advance):
            blocks[number] = content
            if cache:
                cache.save(number, local[number], content)
    indices_N = torch.tensor([index for block in local.values() for index in block], dtype=torch.int64)
    parts = (blocks.pop(number) for number in local)  # the memory of each block is freed after its copy
    return _readable(*gather_by_index(*join_parts(parts, n=len(indices_N)), indices_N))


def require_readable(labels_M: Tensor, task: Task, *, label: str, split: str) -> None:
    """Raise `UserError` if no image could be read; the reasons are in `bad_images_SPLIT.txt`."""
    if not len(labels_M):
        raise UserError(f"data: none of the {label} can be read, see {task.output / f'bad_images_{split}.txt'}.")


def feature_key(task: Task, images: ViewedImages, *, kind: str, indices: Sequence[int]) -> str:
    """The name of features in the cache: a digest of everything that they depend on."""
    network, decoder, view, labels = task.network, images.decoder, images.view, images.source.labels
    described = f"{type(view).__module__}.{type(view).__qualname__} {getattr(view, 'config', '')!r}"
    parts = {
        "format": f"{FORMAT} {BLOCK}",
        "weights": f"{network.digest} {type(network.backbone).__qualname__}",
        "precision": f"{task.context.fabric.strategy.precision.precision} {torch.get_float32_matmul_precision()}",
        "kind": kind,
        "view": f"{described} {network.mean} {network.std} {images.blank}",
        "decoder": f"{decoder.channels} {decoder.value_range} {decoder.nan_value} {decoder.apply_exif_rotation}",
        "source": _fingerprint(images.source),
        "labels": content_digest(b"" if labels is None else labels.tobytes()),
        "indices": content_digest(np.asarray(indices, dtype=np.int64).tobytes()),
    }
    return content_digest(*(f"{name}={value}".encode() for name, value in parts.items()))


class BlockCache:
    """The blocks of one key. An unreadable block counts as missing; a write error is reported once."""

    def __init__(self, folder: Path, *, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.writable = True

    def path(self, number: int) -> Path:
        """The file of a block."""
        return self.folder / f"{number:06d}.safetensors"

    def load(self, number: int, block: Sequence[int]) -> Block | None:
        """The features and labels of a block; None if its file is missing or damaged."""
        try:
            with safe_open(self.path(number), framework="pt") as file:
                features_ND, labels_N, indices_N = (file.get_tensor(name) for name in ("features", "labels", "indices"))
                checksum = (file.metadata() or {}).get("checksum")
        except (OSError, SafetensorError):
            return None
        complete = indices_N.tolist() == list(block) and len(features_ND) == len(labels_N) == len(block)
        return (features_ND, labels_N) if complete and checksum == _checksum(features_ND, labels_N) else None

    def save(self, number: int, block: Sequence[int], content: Block) -> None:
        """Write the file of a block, completely or not at all."""
        if not self.writable:
            return
        features_ND, labels_N = content
        tensors = {"features": features_ND, "labels": labels_N, "indices": torch.tensor(block, dtype=torch.int64)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path(number), unique=True) as file:
                file.write(save(tensors, metadata={"checksum": _checksum(features_ND, labels_N)}))
        except (OSError, SafetensorError) as error:
            self.writable = False
            self.say(f"feature_cache: cannot write to {self.folder} ({error}); the evaluation continues without it.")


def _extract(
    task: Task,
    forward: Callable[[Tensor], Tensor],
    images: ViewedImages,
    missing: dict[int, list[int]],
    *,
    batch_size: int,
    advance: Callable[[int], None],
) -> Iterator[tuple[int, Block]]:
    """Yields each finished block. All blocks share one loader, so its processes start only once."""
    cuts = {number: range(0, len(block), batch_size) for number, block in missing.items()}
    batches = [missing[number][start : start + batch_size] for number, starts in cuts.items() for start in starts]
    features = extract_batches(
        forward, images, batches=batches, num_workers=task.num_workers, device=task.context.device
    )
    for number, starts in cuts.items():
        parts = []
        for features_BD, labels_B in islice(features, len(starts)):
            parts.append((features_BD, labels_B))
            advance(len(labels_B))
        yield number, (torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))


def _readable(features_MD: Tensor, labels_M: Tensor, indices_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    readable_M = labels_M != BROKEN
    if readable_M.all():  # almost always; saves a copy
        return features_MD, labels_M, indices_M
    return features_MD[readable_M], labels_M[readable_M], indices_M[readable_M]


def _fingerprint(source: ImageSource) -> str:
    """The fingerprint of a source, computed once because it may read the state of every file."""
    if source not in _fingerprints:
        _fingerprints[source] = source.fingerprint()
    return _fingerprints[source]


def _checksum(features_ND: Tensor, labels_N: Tensor) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    for tensor in (features_ND, labels_N):
        hashed.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return hashed.hexdigest()
