"""All ranks of a run see the same configuration, code and images, or the run ends before its first step.

Ranks that differ would not fail by themselves: those with more images wait for the others at the end of an epoch,
those with other code average gradients of something else.
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
from dino_lightning.data.module import MultiCropDataModule
from dino_lightning.data.sources import ImageSource, ImageStream
from dino_lightning.data.sources.base import content_digest
from dino_lightning.errors import RanksDifferError
from dino_lightning.runtime.collectives import all_gather_objects
from dino_lightning.runtime.provenance import commit

PACKAGE = Path(dino_lightning.__file__).parent
"""The files whose digest is compared."""
OF_THE_MACHINE = ("output_dir", "cpu_threads", "data.cache_dir", "data.path", "data.root")
"""Keys that may differ: machines keep the same images in different places, and have different cores."""
PACKAGES = ("dino-lightning", "torch", "torchvision", "lightning", "timm", "numpy", "pillow")
AT = " at commit "
"""Between the digest of the code and what it is called."""
NAMES = 4096
"""Images of a source whose names are compared, spread evenly; their labels are compared all."""
SAME = 1e-4
"""Difference of two checksums of weights up to which they count as equal: processors round differently when they draw
them, and DDP then gives all ranks those of the first."""


class RankConsistencyCheck(Callback):
    """Compares what all ranks are about to train, once their group exists."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raise `RanksDifferError` on all ranks alike where one differs."""
        if stage != "fit" or trainer.world_size == 1:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        here = {
            **code(self.config.imports),
            **settings(asdict(self.config)),
            **(images(data) if isinstance(data, MultiCropDataModule) else {}),
            "checkpoint to go on from": checkpoint(trainer.ckpt_path),
            **weights(pl_module),
        }
        compare(all_gather_objects((socket.gethostname(), here)))


def compare(ranks: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Raise `RanksDifferError` about the first fact that ranks (name of the machine, facts) do not share."""
    for name in dict.fromkeys(name for _, facts in ranks for name in facts):
        values = [facts.get(name, "nothing") for _, facts in ranks]
        usual = Counter(map(_comparable, values)).most_common(1)[0][0]  # of two: what the first has
        same = next(rank for rank, value in enumerate(values) if _comparable(value) == usual)
        odd = [rank for rank, value in enumerate(values) if not _equal(value, values[same])]
        if odd:
            others = f" (and so {len(odd) - 1} more)" if len(odd) > 1 else ""
            raise RanksDifferError(
                f"{_called(odd[0], ranks)} has {name}={values[odd[0]]}{others}, but {_called(same, ranks)} has "
                f"{name}={values[same]}: all ranks of a run need the same settings, code and images."
            )


def _comparable(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value).split(AT)[0]


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, float):
        return abs(value - other) <= SAME
    return _comparable(value) == _comparable(other)


def _called(rank: int, ranks: Sequence[tuple[str, Any]]) -> str:
    several = len({host for host, _ in ranks}) > 1
    return f"rank {rank} on {ranks[rank][0]}" if several else f"rank {rank}"


def code(imports: Sequence[str]) -> dict[str, Any]:
    """Versions of what computes, and a digest of this package's files and of the files in `imports`."""
    files = sorted(PACKAGE.rglob("*.py"))
    files += [path for path in map(Path, imports) if path.is_file()]
    facts: dict[str, Any] = {f"version of {name}": version(name) for name in PACKAGES}
    # The digest decides: it sees what is not committed, and not a commit of something else between two starts.
    return {**facts, "code": f"{content_digest(*(file.read_bytes() for file in files))}{AT}{commit()}"}


def settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The configuration by dotted key, without what may differ."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= settings(value, f"{key}.")
        elif key not in OF_THE_MACHINE:
            flat[key] = str(value)  # 0.1 of one rank is not to be equal to 0.10001 of another
    return flat


def images(data: MultiCropDataModule) -> dict[str, Any]:
    """How many images there are, and a digest of their labels and names."""
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
    """The same for the same images in another folder; sizes and times are left out, and no file is opened."""
    places = np.unique(np.linspace(0, len(source) - 1, NAMES).astype(int)).tolist() if len(source) else []
    names = [source.describe(place) for place in places]
    common = len(os.path.commonprefix(names))  # noqa: RUF071 - not all sources have paths for names
    labels = b"" if source.labels is None else np.ascontiguousarray(source.labels, dtype=np.int64).tobytes()
    return content_digest(labels, *(os.fsencode(name[common:]) for name in names))


def checkpoint(path: str | Path | None) -> str | None:
    """Name and size of the file, for machines that do not share their folders."""
    if path is None:
        return None
    file = Path(path)
    return f"{file.name} of {file.stat().st_size} bytes" if file.is_file() else f"{file.name}, which is not there"


@torch.no_grad()
def weights(module: nn.Module) -> dict[str, Any]:
    """How many weights there are, and a checksum that does not see how processors round.

    It is the sum of all weights in units of the square root of the sum of their squares: of the size of 1 for weights
    that are drawn, and another number for another draw.
    """
    parameters = [parameter.double() for parameter in module.parameters()]
    total = float(sum(parameter.sum() for parameter in parameters))
    square = float(sum(parameter.square().sum() for parameter in parameters))
    return {
        "number of weights": sum(map(torch.numel, parameters)),
        "checksum of weights": total / max(square, 1e-30) ** 0.5,
    }
