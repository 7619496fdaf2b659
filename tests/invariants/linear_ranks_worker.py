"""One of two ranks that train linear classifiers: `python linear_ranks_worker.py FOLDER`, started by `launch`."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from evaluation_tools import tiny_network

from dino_lightning.config import BuiltinData, LinearEval, LinearFastEval
from dino_lightning.distributed import leave_group, rank
from dino_lightning.evaluation.base import Runtime, Task
from dino_lightning.evaluation.tasks import linear, linear_fast

RANKS, TOTAL_BATCH = 2, 16
DATA = BuiltinData(train_images=102, val_images=49, num_workers=0)
"""Of the last batch, 6 images are left: 3 for each rank."""


def evaluated(folder: Path, *, ranks: int) -> dict[str, Any]:
    """Figures and weights of both evaluations, of this rank."""
    fabric = Fabric(accelerator="cpu", devices=ranks)
    fabric.launch()
    task = Task(tiny_network(), DATA, Runtime(fabric, show_progress=False), folder / f"of{ranks}", seed=4)
    fast = LinearFastEval(n_last_blocks=[1, 2], lrs=[0.03, 0.3, 3.0], epochs=3, classifier_batch_size=32)
    slow = LinearEval(n_last_blocks=2, epochs=2, lr=0.5, batch_size_per_device=TOTAL_BATCH // ranks)
    seen: dict[str, Any] = {"rank": rank()}
    for name, results in (("fast", linear_fast.evaluate(fast, task)), ("linear", linear.evaluate(slow, task))):
        found = {result.metric: result for result in results}
        fabric.barrier()  # the main process writes the last file
        details = found["top1"].details
        seen[name] = {metric: result.value for metric, result in found.items()}
        seen[f"{name}_weights"] = torch.load(details["classifier"], weights_only=True)["state_dict"]
        seen[f"{name}_details"] = details.get("choices") or [entry["top"] for entry in details["epochs"]]
    return seen


def launch(folder: Path) -> list[dict[str, Any]]:
    """Run both ranks; what each has found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(RANKS), "NODE_RANK": "0"}
    command = [sys.executable, __file__, str(folder)]
    processes = [subprocess.Popen(command, env={**shared, "LOCAL_RANK": str(number)}) for number in range(RANKS)]
    assert [process.wait(timeout=300) for process in processes] == [0] * RANKS
    return [torch.load(folder / f"rank{number}.pt", weights_only=True) for number in range(RANKS)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    torch.save(evaluated(where, ranks=RANKS), where / f"rank{os.environ['LOCAL_RANK']}.pt")
    leave_group()
