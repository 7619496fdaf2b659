"""Two ranks that train with masked patches, by `launch`: `ranks_worker` with another network and masks from content."""

from pathlib import Path
from typing import Any

import ranks_worker
import tiny
import torch
from content_masks import mask_by_content
from ranks import on_ranks, results_of_ranks
from ranks_worker import BATCH, RANKS, STEPS, Case

CASES = {
    "ddp": Case("ddp"),
    "ddp, accumulated": Case("ddp", accumulate=4),
    "fsdp": Case("fsdp"),
}


UNMASKED = 7e-6
"""A first pixel whose seed gives no mask."""


def module_and_batches(case: Case) -> tuple[Any, tiny.Batches]:
    """The same on every rank and in the test process; in every second step, no image of the second rank has a mask."""
    torch.manual_seed(3)
    batch_size = BATCH // RANKS // case.accumulate
    module = tiny.dino(
        optim=case.optim, batch_size=batch_size, depth=case.depth, patch_loss_weight=0.5, **ranks_worker.METHOD
    )
    batches = tiny.batches(STEPS)
    for crops in batches[::2]:
        for view in crops[:2]:
            view[BATCH // RANKS :, 0, 0, 0] = UNMASKED
    return mask_by_content(module, patch=tiny.PATCH), batches


def launch(folder: Path) -> list[dict[str, dict[str, Any]]]:
    """Run both ranks; returns the results of each by case."""
    on_ranks(main, folder)
    return results_of_ranks(folder)


def main(rank: int, folder: Path) -> None:
    ranks_worker.module_and_batches = module_and_batches
    seen = {
        name: ranks_worker.train(case, start=folder / "none", end=folder / f"{name}.ckpt")
        for name, case in CASES.items()
    }
    torch.save(seen, folder / f"rank{rank}.pt")
    ranks_worker.leave_group()
