"""One rank of a two-rank training: `python ranks_worker.py FOLDER`, started by test_ranks.py with LOCAL_RANK and so on."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import tiny
import torch
from torch.utils.data import DataLoader

METHOD: dict[str, Any] = {"teacher_momentum": 0.9, "norm_last_layer": False, "freeze_last_layer": "1it"}
STEPS, RANKS = 5, 2


class Gradients(L.Callback):
    """The student's gradients at each optimizer step, averaged over ranks and not yet clipped."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.student.named_parameters()
        self.seen.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def module_and_batches() -> tuple[Any, tiny.Batches]:
    """The same on every rank and in the test itself."""
    torch.manual_seed(3)
    return tiny.dino(batch_size=8 // RANKS, **METHOD), tiny.batches(STEPS)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    module, whole = module_and_batches()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy="ddp",
        precision="64-true",
        max_epochs=1,
        callbacks=[record := tiny.Record(), gradients := Gradients()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    own = [batch for index, batch in enumerate(tiny.split(whole, parts=RANKS)) if index % RANKS == trainer.global_rank]
    trainer.fit(module, DataLoader(own, batch_size=None))  # type: ignore[arg-type]
    torch.save(
        {
            "losses": record.losses,
            "centers": record.centers,
            "student": record.students[-1],
            "teacher": record.teachers[-1],
            "gradients": gradients.seen,
            "rates": record.rates,
        },
        folder / f"rank{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
