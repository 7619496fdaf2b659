"""Saves per-rank state in the checkpoint: random generators, sums of the epoch, the feature buffer."""

import random
from typing import Any

import lightning as L
import numpy as np
import torch

from dino_lightning.methods.base import Method
from dino_lightning.runtime.collectives import all_gather_objects, rank, world_size

KEY = "ranks"


class RankStates(L.Callback):
    """Saves every rank's state in the checkpoint, and restores it before the first step of a resumed run.

    This needs the same number of ranks. With another number, random states start from the seed, and the epoch's mean
    loss covers only the rest of the epoch.
    """

    def __init__(self) -> None:
        self._loaded: list[dict[str, Any]] | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Gather the states of all ranks, which all call this together."""
        checkpoint[KEY] = all_gather_objects(rank_state(pl_module))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the states until the first step."""
        self._loaded = checkpoint.get(KEY)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Restore this rank's state, after everything that may draw random numbers when a run starts."""
        states, self._loaded = self._loaded, None
        if states is None:
            return
        if len(states) == world_size():
            restore_rank_state(pl_module, states[rank()])
        elif trainer.is_global_zero:
            print(
                f"The checkpoint was written by {len(states)} ranks, but this run has {world_size()}: random states "
                "and the order of the images differ from the resumed run.",
                flush=True,
            )


def rank_state(method: Method) -> dict[str, Any]:
    """This rank's state, in plain types and tensors on the CPU."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    version, internal_state, gauss = random.getstate()
    buffer = method.feature_buffer
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if method.device.type == "cuda" else None,
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *(float(number) for number in rest)],
        "python": [version, list(internal_state), gauss],
        "metrics": method.metrics.state_dict(),
        "feature_buffer": None if buffer is None else buffer.state_dict(),
    }


def restore_rank_state(method: Method, states: dict[str, Any]) -> None:
    """Continue from a saved state."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and method.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), int(position), int(has_gauss), gauss))
    version, internal_state, next_gauss = states["python"]
    random.setstate((version, tuple(internal_state), next_gauss))
    method.metrics.load_state_dict(states["metrics"])
    if method.feature_buffer is not None and states["feature_buffer"] is not None:
        method.feature_buffer.load_state_dict(states["feature_buffer"], device=method.device)
