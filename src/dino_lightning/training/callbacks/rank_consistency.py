"""Ends a run before its first step if its ranks differ in configuration, code, images or weights.

Ranks that differ do not fail by themselves: those with more images would hang at the end of an epoch, those with
different code would average unrelated gradients.
"""

import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

import dino_lightning
from dino_lightning.config import TrainConfig
from dino_lightning.config.dotted import flatten
from dino_lightning.data.module import MultiCropDataModule
from dino_lightning.data.sources import ImageSource, ImageStream
from dino_lightning.data.sources.base import content_digest, evenly_spaced
from dino_lightning.errors import RanksDifferError
from dino_lightning.runtime.collectives import all_gather_objects
from dino_lightning.runtime.provenance import commit

PACKAGE = Path(dino_lightning.__file__).parent
"""The files whose digest is compared."""
MACHINE_KEYS = ("output_dir", "cpu_threads", "data.cache_dir", "data.path", "data.root")
"""Keys that may differ: machines can have the same images in different folders, and different numbers of cores."""
PACKAGES = ("dino-lightning", "torch", "torchvision", "lightning", "timm", "numpy", "pillow")
AT_COMMIT = " at commit "
"""Separates the digest of the code, which is compared, from the commit, which is not."""
COMPARED_NAMES = 4096
"""Images whose names are compared, spread evenly over a source; all labels are compared."""
CHECKSUM_TOLERANCE = 1e-4
"""Checksums of weights may differ by this much: processors round random weights differently, and DDP then copies the
weights of rank 0 to all ranks."""


class RankConsistencyCheck(Callback):
    """Compares what all ranks are about to train, once their process group exists."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raise `RanksDifferError` on all ranks if one of them differs."""
        if stage != "fit" or trainer.world_size == 1:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        facts = {
            **code(self.config.imports),
            **settings(asdict(self.config)),
            **(images(data) if isinstance(data, MultiCropDataModule) else {}),
            "checkpoint to resume from": checkpoint(trainer.ckpt_path),
            **weights(pl_module),
        }
        compare(all_gather_objects((socket.gethostname(), facts)))


def compare(ranks: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Raise `RanksDifferError` about the first fact in which ranks, each (host name, facts), differ."""
    for name in dict.fromkeys(name for _, facts in ranks for name in facts):
        values = [facts.get(name, "nothing") for _, facts in ranks]
        majority = Counter(map(_comparable, values)).most_common(1)[0][0]  # in a tie, the value of the first rank
        reference = next(rank for rank, value in enumerate(values) if _comparable(value) == majority)
        deviating = [rank for rank, value in enumerate(values) if not _equal(value, values[reference])]
        if deviating:
            first = deviating[0]
            others = f" (and {len(deviating) - 1} more ranks differ)" if len(deviating) > 1 else ""
            raise RanksDifferError(
                f"{_rank_name(first, ranks)} has {name}={values[first]}{others}, but {_rank_name(reference, ranks)} "
                f"has {name}={values[reference]}: all ranks of a run need the same settings, code and images."
            )


def _comparable(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value).split(AT_COMMIT)[0]


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, float):
        return abs(value - other) <= CHECKSUM_TOLERANCE
    return _comparable(value) == _comparable(other)


def _rank_name(rank: int, ranks: Sequence[tuple[str, Any]]) -> str:
    several_hosts = len({host for host, _ in ranks}) > 1
    return f"rank {rank} on {ranks[rank][0]}" if several_hosts else f"rank {rank}"


def code(imports: Sequence[str]) -> dict[str, Any]:
    """Package versions, and a digest of this package's files and of the files in `imports`."""
    files = sorted(PACKAGE.rglob("*.py"))
    files += [path for path in map(Path, imports) if path.is_file()]
    facts: dict[str, Any] = {f"version of {name}": version(name) for name in PACKAGES}
    # The digest is compared: it includes uncommitted changes, and ignores commits of other files.
    return {**facts, "code": f"{content_digest(*(file.read_bytes() for file in files))}{AT_COMMIT}{commit()}"}


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration by dotted key, without the keys that may differ."""
    # As text, so that the tolerance for checksums does not apply.
    return {key: str(value) for key, value in flatten(config).items() if key not in MACHINE_KEYS}


def images(data: MultiCropDataModule) -> dict[str, Any]:
    """The number of images, and a digest of their labels and names."""
    train, val = data.sources.train, data.sources.val
    facts: dict[str, Any] = {"number of training images": data.num_images}
    facts["number of validation images"] = len(val) if val is not None else 0
    if isinstance(train, ImageStream):
        return {**facts, "number of shards": train.shards}
    facts["digest of names and labels of the training images"] = names_digest(train)
    if val is not None:
        facts["digest of names and labels of the validation images"] = names_digest(val)
    return facts


def names_digest(source: ImageSource) -> str:
    """The same for the same images in another folder; sizes and times are ignored, and no file is opened."""
    indices = evenly_spaced(len(source), COMPARED_NAMES) if len(source) else []
    names = [source.describe(index) for index in indices]
    common = len(os.path.commonprefix(names))  # noqa: RUF071 - not all sources use paths as names
    labels = b"" if source.labels is None else np.ascontiguousarray(source.labels, dtype=np.int64).tobytes()
    return content_digest(labels, *(os.fsencode(name[common:]) for name in names))


def checkpoint(path: str | Path | None) -> str | None:
    """Name and size of the file, as machines need not share their folders."""
    if path is None:
        return None
    file = Path(path)
    return f"{file.name} of {file.stat().st_size} bytes" if file.is_file() else f"{file.name}, which does not exist"


@torch.no_grad()
def weights(module: nn.Module) -> dict[str, Any]:
    """The number of weights, and a checksum that hardly depends on how processors round.

    The checksum is the sum of all weights over their L2 norm: about 1 for random weights, and different for each seed.
    """
    parameters = [parameter.double() for parameter in module.parameters()]
    total = float(sum(parameter.sum() for parameter in parameters))
    square = float(sum(parameter.square().sum() for parameter in parameters))
    return {
        "number of weights": sum(map(torch.numel, parameters)),
        "checksum of weights": total / max(square, 1e-30) ** 0.5,
    }
