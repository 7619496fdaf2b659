"""Two ranks that differ, by `launch`.

Each case is a whole `Trainer.fit` with real images; what the ranks do not share is written out in `CASES`.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from composing import composed
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from PIL import Image
from ranks import on_ranks, results_of_ranks

import dino_lightning
from dino_lightning.config import TrainConfig
from dino_lightning.runtime.collectives import leave_group, rank
from dino_lightning.training.build import build_data, build_method
from dino_lightning.training.callbacks import rank_consistency as agreement
from dino_lightning.training.callbacks.rank_consistency import RankConsistencyCheck
from dino_lightning.training.strategy import build_strategy

RANKS, IMAGES = 2, 24


class Steps(Callback):
    """Number of micro-batches that were started."""

    def __init__(self) -> None:
        self.begun = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.begun += 1


@dataclass(frozen=True)
class Case:
    """A difference between the second rank and the first."""

    second: list[str] = field(default_factory=list)
    """Overrides of its command line."""
    folder: str = ""
    """The folder of its images, instead of `same`."""
    patch: Callable[[Path], None] | None = None


def other_commit(_: Path) -> None:
    agreement.commit = lambda: "b" * 40  # type: ignore[assignment]


def other_code(folder: Path) -> None:
    package = Path(dino_lightning.__file__).parent
    copy = folder / "code"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "losses" / "cross_view.py").open("a") as file:
        file.write("\n")
    agreement.PACKAGE = copy


def other_version(_: Path) -> None:
    versions = agreement.version
    agreement.version = lambda name: "0.0.1" if name == "timm" else versions(name)


CASES = {
    "alike": Case(),
    "another folder of the same images": Case(folder="copy"),
    "more threads": Case(["cpu_threads=2"]),
    "a key": Case(["method.student_temperature=0.2"]),
    "a nested list": Case(["crops.local_scale=[0.1,0.4]"]),
    "the seed": Case(["seed=1"]),
    "fewer images": Case(folder="fewer"),
    "another name": Case(folder="renamed"),
    "another class": Case(folder="moved"),
    "weights": Case(patch=lambda _: torch.manual_seed(17)),  # type: ignore[arg-type,return-value]
    "the commit": Case(patch=other_commit),
    "the code": Case(patch=other_code),
    "a version": Case(patch=other_version),
}


def prepare(folder: Path) -> None:
    """Copies of the images: without the last one, with another name, and with one image in another class."""
    for kind in ("same", "copy", "fewer", "renamed", "moved"):
        for number in range(IMAGES - (kind == "fewer")):
            last = number == IMAGES - 1
            label = "ab"[number % 2] if not (last and kind == "moved") else "a"
            name = f"{number:03}{'x' if last and kind == 'renamed' else ''}.png"
            path = folder / kind / ("deep/er" if kind == "copy" else "") / label / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (9 * number, 80, 120)).save(path)


def attempt(case: Case, folder: Path) -> dict[str, Any]:
    """The error message of this rank, and the steps that it started."""
    second = os.environ["LOCAL_RANK"] == "1"
    images = (case.folder if second else "") or "same"
    path = folder / images / ("deep/er" if images == "copy" else "")
    words = ["data.num_workers=0", "data.batch_size_per_device=4", f"data.path={path}", "data=folder"]
    words += ["data.holdout=0.25", f"data.cache_dir={folder}/cache{int(second)}", "cpu_threads=1"]
    words += ["experiment=quick", *(case.second if second else [])]
    config = cast(TrainConfig, OmegaConf.to_object(composed(*words, output_dir=folder / f"out{int(second)}")))
    L.seed_everything(config.seed, verbose=False)
    before = agreement.commit, agreement.version, agreement.PACKAGE
    if case.patch and second:
        case.patch(folder)
    steps = Steps()
    config.trainer.accelerator, config.trainer.devices = "cpu", RANKS
    trainer = L.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=build_strategy(config.trainer),
        max_epochs=1,
        max_steps=1,
        callbacks=[RankConsistencyCheck(config), steps],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    said = ""
    try:
        trainer.fit(build_method(config), datamodule=build_data(config))
    except agreement.RanksDifferError as error:
        said = str(error)
    agreement.commit, agreement.version, agreement.PACKAGE = before
    return {"said": said, "steps": steps.begun, "rank": rank()}


def launch(folder: Path, *cases: str) -> list[dict[str, dict[str, Any]]]:
    """Run both ranks; returns the results of each by case."""
    prepare(folder)
    on_ranks(main, folder, *cases)
    return results_of_ranks(folder)


def main(rank: int, folder: Path, *cases: str) -> None:
    seen = {name: attempt(CASES[name], folder) for name in cases}
    torch.save(seen, folder / f"rank{rank}.pt")
    leave_group()
