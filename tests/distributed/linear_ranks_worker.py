"""Two ranks that train linear classifiers, by `launch`."""

from pathlib import Path
from typing import Any

import torch
from evaluation_tools import tiny_network
from lightning import Fabric
from ranks import on_ranks, results_of_ranks

from dino_lightning.config import BuiltinData, LinearEval, LinearGridEval
from dino_lightning.evaluation.classification import linear
from dino_lightning.evaluation.classification import linear_grid as linear_grid
from dino_lightning.evaluation.context import EvalContext, Task
from dino_lightning.runtime.collectives import leave_group, rank

RANKS, TOTAL_BATCH = 2, 16
DATA = BuiltinData(train_images=102, val_images=49, num_workers=0)
"""The last batch has 6 images: 3 per rank."""


def evaluated(folder: Path, *, ranks: int) -> dict[str, Any]:
    """This rank's results and weights of both evaluations."""
    fabric = Fabric(accelerator="cpu", devices=ranks)
    fabric.launch()
    task = Task(tiny_network(), DATA, EvalContext(fabric, show_progress=False), folder / f"of{ranks}", seed=4)
    fast = LinearGridEval(n_last_blocks=[1, 2], lrs=[0.03, 0.3, 3.0], epochs=3, classifier_batch_size=32)
    slow = LinearEval(n_last_blocks=2, epochs=2, lr=0.5, batch_size_per_device=TOTAL_BATCH // ranks)
    seen: dict[str, Any] = {"rank": rank()}
    for name, results in (("fast", linear_grid.evaluate(fast, task)), ("linear", linear.evaluate(slow, task))):
        found = {result.metric: result for result in results}
        fabric.barrier()  # the main process writes the last file
        details = found["top1"].details
        seen[name] = {metric: result.value for metric, result in found.items()}
        seen[f"{name}_weights"] = torch.load(details["classifier"], weights_only=True)["state_dict"]
        seen[f"{name}_details"] = details.get("choices") or [entry["top"] for entry in details["epochs"]]
    return seen


def launch(folder: Path) -> list[dict[str, Any]]:
    """Run both ranks; returns the results of each."""
    on_ranks(main, folder)
    return results_of_ranks(folder)


def main(rank: int, folder: Path) -> None:
    torch.save(evaluated(folder, ranks=RANKS), folder / f"rank{rank}.pt")
    leave_group()
