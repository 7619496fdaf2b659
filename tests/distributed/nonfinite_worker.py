"""Trainings on two ranks, one of which has a step that is not finite, by `launch`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import tiny
import torch
from lightning.pytorch.plugins.precision import DoublePrecision
from nonfinite_cases import BAD, STEPS, BadGradient, broken, callback
from ranks import on_ranks, results_of_ranks
from torch import Tensor
from torch.utils.data import DataLoader

from dino_lightning.checkpoints.run_checkpoint import SafeCheckpointIO
from dino_lightning.config import AdamWConfig, TrainerConfig
from dino_lightning.runtime.collectives import leave_group
from dino_lightning.runtime.sharding import full_tensor
from dino_lightning.training.strategy import build_strategy

RANKS, BATCH, CULPRIT = 2, 8, 1


@dataclass(frozen=True)
class Case:
    """A fault, and the settings of the training."""

    strategy: str
    policy: str
    cause: str = "loss"
    accumulate: int = 1
    batch_norm: bool = False


CASES = {
    "ddp, stop": Case("ddp", "stop"),
    "ddp, skip": Case("ddp", "skip"),
    "ddp, skip, accumulated": Case("ddp", "skip", accumulate=2),
    "ddp, skip, batch norms": Case("ddp", "skip", batch_norm=True),
    "ddp, skip, gradient": Case("ddp", "skip", cause="gradient"),
    "ddp, rollback": Case("ddp", "rollback"),
    "fsdp, skip": Case("fsdp", "skip"),
    "fsdp, skip, gradient": Case("fsdp", "skip", cause="gradient"),
    "fsdp, rollback": Case("fsdp", "rollback"),
    "fsdp, stop": Case("fsdp", "stop"),
}
FAST = ("ddp, stop", "ddp, skip, accumulated", "fsdp, rollback")
SLOW = tuple(name for name in CASES if name not in FAST)


class After(L.Callback):
    """Full weights, and sums of the optimizer's state, after each optimizer step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.sums: list[list[float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.states.append({name: full_tensor(t.detach()).clone() for name, t in pl_module.state_dict().items()})
        states = list(trainer.optimizers[0].state.values())
        self.sums.append([full_tensor(t).double().sum().item() for state in states for t in state.values()])


def module_and_batches(case: Case) -> tuple[Any, tiny.Batches]:
    """The same on every rank and in the test process; the total batch of each step."""
    torch.manual_seed(3)
    module = tiny.dino(
        optim=AdamWConfig(lr=0.032, lr_warmup="0ep"),
        batch_size=BATCH // RANKS // case.accumulate,
        teacher_momentum=0.9,
        head_batch_norm=case.batch_norm,
    )
    return module, tiny.batches(STEPS)


def train(case: Case, folder: Path) -> dict[str, Any]:
    """The results of this rank."""
    module, batches = module_and_batches(case)
    config = TrainerConfig(
        accelerator="cpu", devices=RANKS, strategy=case.strategy, accumulate_grad_batches=case.accumulate
    )
    keeper = callback(folder, case.policy)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=build_strategy(config),
        plugins=[DoublePrecision(), SafeCheckpointIO()],
        accumulate_grad_batches=case.accumulate,
        max_epochs=1,
        callbacks=[keeper, after := After()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    if case.policy == "rollback":
        trainer.callbacks.append(SaveAfter(folder / "checkpoints" / "last.ckpt", step=1))  # type: ignore[attr-defined]
    parts = tiny.split(batches, parts=RANKS * case.accumulate)
    own = [batch for index, batch in enumerate(parts) if index % RANKS == trainer.global_rank]
    if trainer.global_rank == CULPRIT and case.cause == "loss":
        own = broken(own, BAD * case.accumulate)
    if trainer.global_rank == CULPRIT and case.cause == "gradient":
        trainer.callbacks.append(BadGradient(BAD))  # type: ignore[attr-defined]
    error = ""
    try:
        trainer.fit(module, DataLoader(own, batch_size=None))  # type: ignore[arg-type]
    except FloatingPointError as raised:
        error = str(raised)
    state = {name: full_tensor(t.detach()).clone() for name, t in module.state_dict().items()}
    return {
        "error": error,
        "count": keeper.count,
        "states": after.states,
        "sums": after.sums,
        "end": state,
        "steps": trainer.global_step,
    }


class SaveAfter(L.Callback):
    """Saves one checkpoint after a step."""

    def __init__(self, path: Path, *, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def launch(folder: Path, *cases: str) -> list[dict[str, dict[str, Any]]]:
    """Run both ranks; returns the results of each by case."""
    on_ranks(main, folder, *cases)
    return results_of_ranks(folder)


def main(rank: int, folder: Path, *cases: str) -> None:
    seen = {case: train(CASES[case], folder / case) for case in cases}
    torch.save(seen, folder / f"rank{rank}.pt")
    leave_group()
