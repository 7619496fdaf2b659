"""Trainings of all methods on two ranks, by `launch`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import tiny
import tiny_methods
import torch
from lightning.pytorch.plugins.precision import DoublePrecision
from ranks import on_ranks, results_of_ranks
from torch import Tensor
from torch.utils.data import DataLoader

from dino_lightning.config import AdamWConfig, TrainerConfig
from dino_lightning.runtime.collectives import leave_group
from dino_lightning.runtime.sharding import full_tensor, is_sharded
from dino_lightning.training.strategy import build_strategy

STEPS, RANKS, BATCH = 4, 2, 8
OPTIM = AdamWConfig(lr=0.064, lr_warmup="0ep", clip_grad=0.05)
# On CPUs, batch norms use only the images of their rank, so cases that are compared with one process have none.
PLAIN: dict[str, Any] = {"head_batch_norm": False}


@dataclass(frozen=True)
class Case:
    """A method, its strategy, and the number of its crops."""

    method: str
    changed: dict[str, Any] = field(default_factory=dict)
    strategy: str = "ddp"
    accumulate: int = 1
    views: int = 2
    batch_norm: bool = False
    """A single process then has two micro-batches per step."""


CASES = {
    "dino, sinkhorn": Case("dino", {"centering": "sinkhorn"}, views=4),
    "dino, softmax": Case("dino", {"centering": "softmax"}),
    "dino, sinkhorn, fsdp": Case("dino", {"centering": "sinkhorn", "predictor": True}, "fsdp"),
    "byol": Case("byol", PLAIN),
    "byol, batch norms": Case("byol", batch_norm=True),
    "byol, fsdp": Case("byol", PLAIN, "fsdp"),
    "moco 2": Case("moco2"),
    "moco 2, accumulated": Case("moco2", accumulate=2),
    "moco 2, fsdp": Case("moco2", strategy="fsdp"),
    "moco 3": Case("moco3", PLAIN),
    "moco 3, fsdp": Case("moco3", {**PLAIN, "freeze_patch_embedding": True}, "fsdp"),
    "swav": Case("swav", PLAIN, views=4),
    "swav, queue": Case("swav", {**PLAIN, "queue_length": 11}),
    "swav, queue, fsdp": Case("swav", {**PLAIN, "queue_length": 11}, "fsdp"),
    "supervised": Case("supervised"),
    "supervised, fsdp": Case("supervised", strategy="fsdp"),
}


def module_and_batches(case: Case, *, ranks: int) -> tuple[Any, list[Any]]:
    """The same on every rank and in the test process."""
    torch.manual_seed(3)
    batch_size = BATCH // ranks // case.accumulate
    if case.method == "dino":
        module: Any = tiny.dino(optim=OPTIM, batch_size=batch_size, **case.changed)
    else:
        module = tiny_methods.build(case.method, optim=OPTIM, batch_size=batch_size, **case.changed)
    whole_batches = [crops[: case.views] for crops in tiny.batches(STEPS)]
    parts = tiny.split(whole_batches, parts=ranks * case.accumulate)
    return module, tiny_methods.labeled(parts) if case.method == "supervised" else parts


def launch(folder: Path, *cases: str) -> list[dict[str, dict[str, Any]]]:
    """Run both ranks; returns the results of each by case."""
    on_ranks(main, folder, *cases, ranks=RANKS)
    return results_of_ranks(folder)


def train(case: Case) -> dict[str, Any]:
    """One training of this rank; returns its results."""
    module, parts = module_and_batches(case, ranks=RANKS)
    config = TrainerConfig(accelerator="cpu", devices=RANKS, strategy=case.strategy)
    config.accumulate_grad_batches = case.accumulate
    trainer = L.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=build_strategy(config),
        plugins=[DoublePrecision()],  # like precision="64-true", which Lightning refuses with FSDP
        accumulate_grad_batches=case.accumulate,
        max_epochs=1,
        callbacks=[states := tiny_methods.States()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    # Micro-batch by micro-batch: rank 0, rank 1, rank 0, ...
    own = [part for index, part in enumerate(parts) if index % RANKS == trainer.global_rank]
    trainer.fit(module, DataLoader(own, batch_size=None))  # type: ignore[arg-type]
    sharded = {name for name, tensor in module.named_parameters() if is_sharded(tensor)}
    return {"losses": states.losses, "state": gathered(states.states[-1]), "sharded": sorted(sharded)}


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: full_tensor(tensor) for name, tensor in tensors.items()}


def main(rank: int, folder: Path, *cases: str) -> None:
    torch.save({name: train(CASES[name]) for name in cases}, folder / f"rank{rank}.pt")
    leave_group()
