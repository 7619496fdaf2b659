"""Features of many images, kept on disk block by block: an evaluation that was interrupted goes on where it was.

    features_MD, labels_M, indices_M = cached_features(
        task, task.runtime.forward(task.network.backbone), images, what="training images", kind="cls", batch_size=256)

The chosen images form blocks of `BLOCK`, dealt to the ranks like cards. A finished block becomes one safetensors file
in `task.cache / KEY /`, where KEY stands for all that the features depend on; a later run reads the blocks that are
there and extracts the others. No batch reaches over the end of a block, so neither the number of ranks nor an
interruption changes a bit of the features.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dino_lightning.data.sources.base import ImageSource, content_digest
from dino_lightning.evaluation.context import Task
from dino_lightning.evaluation.features.extract import features_of_batches, gather_by_index, with_common_width
from dino_lightning.evaluation.features.images import BROKEN, ViewedImages
from dino_lightning.runtime.collectives import rank, world_size

BLOCK = 1024
"""Images of a block: the most that an interruption costs each device."""
FORMAT = "1"
"""To be raised when the same weights and images give other features than in the version before."""

Block = tuple[Tensor, Tensor]
"""Features (n, D) float32 and labels (n,) int64."""

_fingerprints: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def cached_features(
    task: Task,
    forward: Callable[[Tensor], Tensor],
    images: ViewedImages,
    *,
    what: str,
    kind: str,
    batch_size: int,
    indices: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features (M, D) float32, labels (M,) and indices (M,), on every rank, by rising index, broken images left out.

    `indices` chooses images (default all) and names none twice. `what` stands beside the progress bar. `kind` says what
    `forward` computes and, of a view without `config`, what it does: cached features belong to weights, kind, view,
    source, indices and precision. A batch has `batch_size` images, at most `BLOCK`.
    """
    chosen = list(range(len(images))) if indices is None else sorted(int(index) for index in indices)
    kept = None
    if task.cache is not None:
        key = feature_key(task, images, kind=kind, indices=chosen) if task.runtime.is_main else ""
        kept = CachedBlocks(task.cache / task.runtime.fabric.broadcast(key), say=task.runtime.say)
    starts = range(0, len(chosen), BLOCK)[rank() :: world_size()]
    own = {start // BLOCK: chosen[start : start + BLOCK] for start in starts}
    with task.runtime.progress(what, total=sum(map(len, own.values()))) as advance:
        found = {}
        for number, block in own.items():
            content = kept.load(number, block) if kept else None
            if content is not None:
                found[number] = content
                _note_broken(images, block, content[1])
                advance(len(block))
        missing = {number: block for number, block in own.items() if number not in found}
        for number, content in _extracted(task, forward, images, missing, batch_size=batch_size, advance=advance):
            found[number] = content
            if kept:
                kept.save(number, own[number], content)
    return _readable(*gather_by_index(*_shard(found, own)))


def feature_key(task: Task, images: ViewedImages, *, kind: str, indices: Sequence[int]) -> str:
    """A name for features: it changes with everything that they depend on, and does not tell it."""
    network, decoder = task.network, images.decoder
    parts = {
        "format": f"{FORMAT} {BLOCK}",
        "weights": f"{network.digest} {type(network.backbone).__qualname__}",
        "precision": f"{task.runtime.fabric.strategy.precision.precision} {torch.get_float32_matmul_precision()}",
        "kind": kind,
        "view": f"{_described(images.view)} {network.mean} {network.std} {images.blank}",
        "decoder": f"{decoder.channels} {decoder.value_range} {decoder.nan_value} {decoder.apply_exif_rotation}",
        "source": _fingerprint(images.source),
        "labels": content_digest(
            b"" if images.source.labels is None else np.ascontiguousarray(images.source.labels).tobytes()
        ),
        "indices": content_digest(np.asarray(indices, dtype=np.int64).tobytes()),
    }
    return content_digest(*(f"{name}={value}".encode() for name, value in parts.items()))


class CachedBlocks:
    """The blocks of one key. What cannot be read counts as missing; where nothing can be written, it says so once."""

    def __init__(self, folder: Path, *, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.writable = True

    def path(self, number: int) -> Path:
        """The file of a block."""
        return self.folder / f"{number:06d}.safetensors"

    def load(self, number: int, block: Sequence[int]) -> Block | None:
        """The block's features and labels; None where there is no file, or a damaged one."""
        try:
            with safe_open(self.path(number), framework="pt") as file:
                features_ND, labels_N, indices_N = (file.get_tensor(name) for name in ("features", "labels", "indices"))
                checksum = (file.metadata() or {}).get("checksum")
        except (OSError, SafetensorError):
            return None
        whole = indices_N.tolist() == list(block) and len(features_ND) == len(labels_N) == len(block)
        return (features_ND, labels_N) if whole and checksum == _checksum(features_ND, labels_N) else None

    def save(self, number: int, block: Sequence[int], content: Block) -> None:
        """Write the block's file, whole or not at all."""
        if not self.writable:
            return
        features_ND, labels_N = content
        tensors = {"features": features_ND, "labels": labels_N, "indices": torch.tensor(block, dtype=torch.int64)}
        written = self.folder / f".{uuid4().hex}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                save_file(tensors, written, metadata={"checksum": _checksum(features_ND, labels_N)})
                os.replace(written, self.path(number))
            finally:
                written.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            self.writable = False
            self.say(f"feature_cache: features cannot be kept in {self.folder} ({error}); the evaluation goes on.")


def _extracted(
    task: Task,
    forward: Callable[[Tensor], Tensor],
    images: ViewedImages,
    missing: dict[int, list[int]],
    *,
    batch_size: int,
    advance: Callable[[int], None],
) -> Iterator[tuple[int, Block]]:
    """Each block when it is finished. One loader for all: its processes start once."""
    cuts = {number: range(0, len(block), batch_size) for number, block in missing.items()}
    batches = [missing[number][start : start + batch_size] for number, starts in cuts.items() for start in starts]
    features = features_of_batches(
        forward, images, batches=batches, num_workers=task.num_workers, device=task.runtime.device
    )
    for number, starts in cuts.items():
        parts = []
        for features_BD, labels_B in islice(features, len(starts)):
            parts.append((features_BD, labels_B))
            advance(len(labels_B))
        yield number, (torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))


def _shard(found: dict[int, Block], own: dict[int, list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's features, labels and indices; each block is let go once it is copied."""
    indices_N = torch.tensor([index for block in own.values() for index in block], dtype=torch.int64)
    width = next(iter(found.values()))[0].shape[1] if found else 0
    features_ND, labels_N = torch.empty(len(indices_N), width), torch.empty(len(indices_N), dtype=torch.int64)
    done = 0
    for number in own:
        features_nD, labels_n = found.pop(number)
        rows = slice(done, done + len(labels_n))
        features_ND[rows], labels_N[rows] = features_nD, labels_n
        done = rows.stop
    return with_common_width(features_ND), labels_N, indices_N


def _readable(features_MD: Tensor, labels_M: Tensor, indices_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    good_M = labels_M != BROKEN
    if good_M.all():  # almost always, and it saves a copy
        return features_MD, labels_M, indices_M
    return features_MD[good_M], labels_M[good_M], indices_M[good_M]


def _note_broken(images: ViewedImages, block: Sequence[int], labels_N: Tensor) -> None:
    """Name the broken images of a cached block, which nobody tries to read again."""
    for place in (labels_N == BROKEN).nonzero().flatten().tolist():
        name = images.source.describe(block[place])
        images.bad.note(name, "it could not be read when the features of its neighbors were kept")


def _described(view: Any) -> str:
    return f"{type(view).__module__}.{type(view).__qualname__} {getattr(view, 'config', '')!r}"


def _fingerprint(source: ImageSource) -> str:
    """Once for each source: it may look at every file."""
    if source not in _fingerprints:
        _fingerprints[source] = source.fingerprint()
    return _fingerprints[source]


def _checksum(features_ND: Tensor, labels_N: Tensor) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    for tensor in (features_ND, labels_N):
        hashed.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return hashed.hexdigest()
