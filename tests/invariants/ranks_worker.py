"""One rank of a two-rank training: `python ranks_worker.py STRATEGY FOLDER`, started by `launch`."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import tiny
import torch
from lightning.pytorch.plugins.precision import DoublePrecision
from torch.utils.data import DataLoader

from dino_lightning.config import AdamWConfig
from dino_lightning.distributed import leave_group
from dino_lightning.sharding import is_sharded, whole
from dino_lightning.strategy import FullySharded

METHOD: dict[str, Any] = {"teacher_momentum": 0.9, "norm_last_layer": False, "freeze_last_layer": "6it"}
CLIP = 0.02
"""Above the norms of some gradients, below those of others."""
STEPS, EPOCHS, RANKS = 5, 2, 2


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
    optim = AdamWConfig(lr=0.032, lr_warmup="0ep", clip_grad=CLIP)
    return tiny.dino(optim=optim, batch_size=8 // RANKS, **METHOD), tiny.batches(STEPS)


def launch(strategy: str, folder: Path) -> list[dict[str, Any]]:
    """Run both ranks; what each has seen. They go on from `folder`/start.ckpt where there is one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": port, "WORLD_SIZE": str(RANKS), "NODE_RANK": "0"}
    command = [sys.executable, __file__, strategy, str(folder)]
    processes = [subprocess.Popen(command, env={**shared, "LOCAL_RANK": str(rank)}) for rank in range(RANKS)]
    assert [process.wait(timeout=120) for process in processes] == [0] * RANKS
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


def main(strategy: str, folder: Path) -> None:
    torch.set_num_threads(1)
    module, whole = module_and_batches()
    start = folder / "start.ckpt"
    trainer = L.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=FullySharded() if strategy == "fsdp" else strategy,
        plugins=[DoublePrecision()],  # as precision="64-true", which Lightning does not let through with FSDP
        max_epochs=EPOCHS,
        callbacks=[record := tiny.Record(), gradients := Gradients()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    own = [batch for index, batch in enumerate(tiny.split(whole, parts=RANKS)) if index % RANKS == trainer.global_rank]
    loader = DataLoader(own, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=start if start.exists() else None, weights_only=True)
    trainer.save_checkpoint(folder / "end.ckpt")
    torch.save(
        {
            "losses": record.losses,
            "centers": record.centers,
            "student": gathered(record.students[-1]),
            "teacher": gathered(record.teachers[-1]),
            "gradients": [gathered(step) for step in gradients.seen],
            "sharded": [is_sharded(tensor) for tensor in module.parameters()],
            "rates": record.rates,
        },
        folder / f"rank{trainer.global_rank}.pt",
    )
    leave_group()


def gathered(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: whole(tensor) for name, tensor in tensors.items()}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
