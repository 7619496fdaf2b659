"""What each rank has to itself, in a checkpoint: random states, sums of the epoch, the window of the collapse alarm."""

import random
from typing import Any

import lightning as L
import numpy as np
import torch

from dino_lightning.methods.base import Method
from dino_lightning.runtime.collectives import all_gather_objects, rank, world_size

KEY = "ranks"


class RankStates(L.Callback):
    """Puts every rank's states into the checkpoint and, in a run that goes on, back before its first step.

    They fit a run with the same number of ranks. With another number a run goes on as one that is started there: the
    seed's random states, and a mean of the epoch over what is left of it.
    """

    def __init__(self) -> None:
        self._found: list[dict[str, Any]] | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """All ranks' states; all ranks call it."""
        checkpoint[KEY] = all_gather_objects(states_of(pl_module))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep them until everything stands."""
        self._found = checkpoint.get(KEY)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Put them back before the first step: whatever starts a run may draw."""
        found, self._found = self._found, None
        if found is None:
            return
        if len(found) == world_size():
            restore(pl_module, found[rank()])
        elif trainer.is_global_zero:
            print(
                f"The checkpoint is of {len(found)} ranks, and this run has {world_size()}: its random states and "
                "the order of its images are not those of the run that it goes on with.",
                flush=True,
            )


def states_of(method: Method) -> dict[str, Any]:
    """This rank's states, in plain types and tensors on the CPU."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    window = method.feature_buffer
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if method.device.type == "cuda" else None,
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *(float(number) for number in rest)],
        "python": [version, list(words), gauss],
        "readings": method.metrics.state_dict(),
        "window": None if window is None else window.state_dict(),
    }


def restore(method: Method, states: dict[str, Any]) -> None:
    """Go on from these."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and method.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"])
    kind, keys, place, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), int(place), int(has_gauss), gauss))
    version, words, next_gauss = states["python"]
    random.setstate((version, tuple(words), next_gauss))
    method.metrics.load_state_dict(states["readings"])
    if method.feature_buffer is not None and states["window"] is not None:
        method.feature_buffer.load_state_dict(states["window"], device=method.device)
