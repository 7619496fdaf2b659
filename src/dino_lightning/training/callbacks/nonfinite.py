"""`callbacks.nonfinite`: what follows a step whose loss or gradient is not finite, and what is kept of it."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn

from dino_lightning.checkpoints.run_checkpoint import AsyncCheckpointIO, latest_valid, read_checkpoint
from dino_lightning.config import NonfiniteConfig
from dino_lightning.data.batch import LabeledCrops
from dino_lightning.methods.base import Method
from dino_lightning.methods.metrics_buffer import MetricsBuffer, StepMetrics
from dino_lightning.methods.nonfinite import ADVICE, NonFinitePolicy, NonFiniteStep
from dino_lightning.runtime.collectives import all_gather_concat
from dino_lightning.runtime.sharding import full_state
from dino_lightning.training.debug.activation_ranges import ActivationRanges, record_ranges
from dino_lightning.training.debug.step_dump import write_step


@dataclass
class MicroBatch:
    """What a rank keeps of a micro-batch until its step is over."""

    batch: Any
    index: int
    """Within the epoch."""
    random: dict[str, Tensor | None]
    """States of the generators before the forward pass."""
    reading: StepMetrics | None = None


class NonfiniteSteps(L.Callback, NonFinitePolicy):
    """Saves the step, counts it, and ends the run, leaves the step out, or takes the run back to its last checkpoint.

    Only one micro-batch is kept, and those of an accumulated step whose loss is known not to be finite: the batch that
    is on the device anyway.
    """

    def __init__(
        self,
        config: NonfiniteConfig,
        *,
        folder: Path,
        checkpoints: Path,
        configuration: dict[str, Any],
        seed: int,
        precision: str,
    ) -> None:
        self.config, self.folder, self.checkpoints = config, folder, checkpoints
        self.configuration, self.seed, self.precision = configuration, seed, precision
        self.continues = config.policy != "stop"
        self.count = 0
        """Steps that were not finite."""
        self.saved = 0
        """Steps that were written to `folder`, of the run: not more than `config.save`."""
        self._kept: list[MicroBatch] = []
        self._step = -1
        """The step to which they belong."""
        self._statistics: list[Tensor] = []
        self._before: list[Tensor] = []
        """What `_statistics` were before the step."""
        self._where = self._end = ""
        self._method: Method
        self._trainer: L.Trainer

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"count": self.count, "saved": self.saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.count, self.saved = state_dict["count"], state_dict["saved"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take over from the method's own policy."""
        self._trainer, self._method = trainer, cast(Method, pl_module)
        self._method.policy = self
        self._kept, self._step, self._statistics, self._before, self._end = [], -1, [], [], ""

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave."""
        self._method.policy = NonFinitePolicy()
        self._kept = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the micro-batch, and how the statistics of batch norms are before the step."""
        if self._step != trainer.global_step:
            self._kept, self._step = [], trainer.global_step
            self._remember_statistics()
        elif self._kept:
            self._forget_finite()
        random = {"cpu": torch.get_rng_state(), "cuda": None}
        if self._method.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self._method.device)
        self._kept.append(MicroBatch(batch, batch_idx, random))

    def _forget_finite(self) -> None:
        """Within an accumulated step: let go of the micro-batch before, once its loss is known to be finite."""
        readings = self._method.metrics
        readings.wait()
        latest = readings.pending[-1] if readings.pending else None
        if latest is None or math.isfinite(latest.local_loss):
            self._kept.pop()
        else:
            self._kept[-1].reading = latest

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let go of a step that is over."""
        if self._step != trainer.global_step:
            self._kept = []
        self._method.log_metric("nonfinite/steps", float(self.count))

    # ------------------------------------------------------------------------------------- a step that is not finite

    def on_nonfinite(self, trouble: NonFiniteStep) -> None:
        """Save the step; raise where the run ends by it."""
        if self._end:
            raise FloatingPointError(self._end)
        self.count += 1
        self._restore_statistics()
        who, self._where = self._save(trouble)
        if self.continues and self.count <= self.config.max_steps:
            return
        before = f" after callbacks.nonfinite.max_steps={self.config.max_steps} such steps" if self.continues else ""
        self._end = f"{trouble}{who}{before}: {ADVICE}. {self._where}".strip()
        raise FloatingPointError(self._end)

    def on_skipped(self, trouble: NonFiniteStep) -> None:
        """Take the run back, where that is the policy; say what was done."""
        self._restore_statistics()
        done = self._roll_back() if self.config.policy == "rollback" else "the step is left out"
        if self._trainer.is_global_zero:
            print(
                f"WARNING: {trouble}: {done}, and training goes on (callbacks.nonfinite.policy={self.config.policy}; "
                f"{self.count} of at most {self.config.max_steps} such steps). {self._where}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    def _remember_statistics(self) -> None:
        if not self._before:
            self._statistics = running_statistics(self._method)
            self._before = [tensor.clone() for tensor in self._statistics]
        else:
            torch._foreach_copy_(self._before, self._statistics)

    def _restore_statistics(self) -> None:
        """Batch norms have seen the images of the step in its forward pass."""
        if self._before:
            torch._foreach_copy_(self._statistics, self._before)

    def _roll_back(self) -> str:
        """Load weights, optimizer and the method's state on all ranks; what was done, in words."""
        strategy = self._trainer.strategy
        if isinstance(strategy.checkpoint_io, AsyncCheckpointIO):
            strategy.checkpoint_io.wait()  # for a file on its way
        found = latest_valid(self.checkpoints) if self._trainer.is_global_zero else None
        path = strategy.broadcast(str(found[0]) if found else "")
        if not path:
            return "there is no checkpoint yet: the step is left out"
        content = found[1] if found else read_checkpoint(Path(path))
        strategy.load_model_state_dict(content, strict=True)
        strategy.load_optimizer_state_dict(content)
        self._method.discard_step()
        return f"weights and optimizer are those of {path}, at step {content['global_step']}"

    # -------------------------------------------------------------------------------------------- what is kept of it

    def _save(self, trouble: NonFiniteStep) -> tuple[str, str]:
        """Write the file of each rank whose own loss is not finite, of all for gradients: who, and where, in words."""
        trainer = self._trainer
        kept, own_loss = None, math.nan
        if not trouble.late and self._kept:
            waiting = self._method.metrics.pending
            self._kept[-1].reading = waiting[-1]
            bad = [one for one in self._kept if one.reading and not math.isfinite(one.reading.local_loss)]
            kept = (bad or self._kept)[0 if bad else -1]
            own_loss = kept.reading.local_loss if kept.reading else math.nan
        is_bad = trouble.loss is None or not math.isfinite(own_loss)
        flags = all_gather_concat(torch.tensor([is_bad], dtype=torch.int32, device=self._method.device))
        ranks = [rank for rank, flag in enumerate(flags.tolist()) if flag]
        who = "" if trouble.loss is None or trainer.world_size == 1 else f" on rank {', '.join(map(str, ranks))}"
        if self.saved >= self.config.max_saved:
            return who, ""
        self.saved += 1
        # All ranks: the forward pass gathers weights and exchanges figures, and so does the state.
        ranges = self._watch(kept) if kept else ActivationRanges()
        state = full_state(self._method)
        names = [self.folder / f"step{trouble.step:06d}-rank{rank}.pt" for rank in ranks]
        if is_bad:
            try:
                write_step(
                    names[ranks.index(trainer.global_rank)], self._content(trouble, kept, own_loss, ranges, state)
                )
            except OSError as error:
                print(
                    f"WARNING: a step could not be saved to {self.folder} ({error.strerror or error}).",
                    file=sys.stderr,
                    flush=True,
                )
        if kept is None:
            return who, (
                f"Its weights are in {names[0]}, without images: on a GPU callbacks.nonfinite.policy=skip "
                "or rollback keeps those, too."
            )
        return who, f"See where it begins: dino replay {names[0]}"

    def _watch(self, kept: MicroBatch) -> ActivationRanges:
        """The ranges of activations, by the same forward pass once more; nothing else changes by it."""
        method, ranges = self._method, ActivationRanges()
        ranges.add("crops", kept.batch)
        context = self._trainer.precision_plugin.train_step_context
        with _undisturbed(method, kept.random), record_ranges(method, into=ranges), context(), torch.no_grad():
            loss = method.loss(kept.batch)
        ranges.add("loss", loss)
        self._restore_statistics()
        return ranges

    def _content(
        self,
        trouble: NonFiniteStep,
        kept: MicroBatch | None,
        loss: float,
        ranges: ActivationRanges,
        state: dict[str, Tensor],
    ) -> dict[str, Any]:
        method, trainer = self._method, self._trainer
        batch = kept.batch if kept else None
        crops, labels = batch if isinstance(batch, LabeledCrops) else (batch, None)
        return {
            "what": str(trouble),
            "configuration": self.configuration,
            "precision": self.precision,
            "step": trouble.step,
            "epoch": trainer.current_epoch,
            "batch_index": kept.index if kept else -1,
            "seed": self.seed,
            "rank": trainer.global_rank,
            "world_size": trainer.world_size,
            "loss": loss,
            "crops": None if crops is None else [crop.detach().cpu().clone() for crop in crops],
            "labels": None if labels is None else labels.cpu().clone(),
            "random": kept.random if kept else {},
            "state": state,
            "ranges": ranges.plain(),
            "schedules": {name: float(method.schedules[name](trouble.step)) for name in method.schedules},
            "lengths": {
                "num_training_batches": int(trainer.num_training_batches),
                "accumulate_grad_batches": trainer.accumulate_grad_batches,
                "total_steps": method.clock.total_steps,
            },
        }


def running_statistics(module: nn.Module) -> list[Tensor]:
    """What a forward pass moves: the running means and variances of batch norms, and their counts."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._NormBase)]
    return [tensor for norm in norms for tensor in norm.buffers(recurse=False)]


@contextmanager
def _undisturbed(method: Method, random: dict[str, Tensor | None]) -> Iterator[None]:
    """Within, random numbers are drawn as from `random` on, and what is measured or logged goes nowhere."""
    readings, window = method.metrics, method.feature_buffer
    devices = [method.device] if method.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        assert random["cpu"] is not None
        torch.set_rng_state(random["cpu"])
        if random["cuda"] is not None:
            torch.cuda.set_rng_state(random["cuda"], method.device)
        method.metrics, method.feature_buffer = MetricsBuffer(), None
        try:
            yield
        finally:
            method.metrics, method.feature_buffer = readings, window
