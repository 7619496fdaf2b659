"""`callbacks.nonfinite`: saves a step whose loss or gradient is not finite, and stops, skips it or rolls back."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
from dino_lightning.runtime.console import warn
from dino_lightning.runtime.sharding import full_state
from dino_lightning.training.debug.activation_ranges import ActivationRanges, record_ranges
from dino_lightning.training.debug.step_dump import write_step


@dataclass
class MicroBatch:
    """A micro-batch of the current step, kept so that it can be saved."""

    batch: Any
    index: int
    """Within the epoch."""
    random: dict[str, Tensor | None]
    """States of the random generators before the forward pass."""
    metrics: StepMetrics | None = None


class NonfiniteSteps(L.Callback, NonFinitePolicy):
    """Counts and saves such steps, and applies the configured policy: stop, skip or rollback.

    It keeps the latest micro-batch, which is on the device anyway, and those of an accumulated step whose loss is known
    not to be finite.
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
        """Steps of the run that were not finite."""
        self.saved = 0
        """Steps of the run that were written to `folder`, at most `config.max_saved`."""
        self._micro_batches: list[MicroBatch] = []
        self._step = -1
        """The step to which they belong."""
        self._statistics: list[Tensor] = []
        self._statistics_before: list[Tensor] = []
        """Copies of `_statistics` from before the step."""
        self._hint = self._error = ""
        self._method: Method
        self._trainer: L.Trainer

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"count": self.count, "saved": self.saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts."""
        self.count, self.saved = state_dict["count"], state_dict["saved"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Replace the method's default policy."""
        self._trainer, self._method = trainer, cast(Method, pl_module)
        self._method.policy = self
        self._micro_batches, self._step, self._error = [], -1, ""
        self._statistics, self._statistics_before = [], []

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the default policy."""
        self._method.policy = NonFinitePolicy()
        self._micro_batches = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the micro-batch, and the batch norms' statistics from before the step."""
        if self._step != trainer.global_step:
            self._micro_batches, self._step = [], trainer.global_step
            self._copy_statistics()
        elif self._micro_batches:
            self._drop_finite_micro_batch()
        random = {"cpu": torch.get_rng_state(), "cuda": None}
        if self._method.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self._method.device)
        self._micro_batches.append(MicroBatch(batch, batch_idx, random))

    def _drop_finite_micro_batch(self) -> None:
        """Drop the previous micro-batch of an accumulated step if its loss is finite."""
        metrics = self._method.metrics
        metrics.wait()
        latest = metrics.pending[-1] if metrics.pending else None
        if latest is None or math.isfinite(latest.local_loss):
            self._micro_batches.pop()
        else:
            self._micro_batches[-1].metrics = latest

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Drop the micro-batches of a completed step."""
        if self._step != trainer.global_step:
            self._micro_batches = []
        self._method.log_metric("nonfinite/steps", float(self.count))

    # ------------------------------------------------------------------------------------------------------- policy

    def on_nonfinite(self, trouble: NonFiniteStep) -> None:
        """Save the step; raises `FloatingPointError` if the run must end."""
        if self._error:
            raise FloatingPointError(self._error)
        self.count += 1
        self._restore_statistics()
        ranks, self._hint = self._save(trouble)
        if self.continues and self.count <= self.config.max_steps:
            return
        limit = f" after callbacks.nonfinite.max_steps={self.config.max_steps} such steps" if self.continues else ""
        self._error = f"{trouble}{ranks}{limit}: {ADVICE}. {self._hint}".strip()
        raise FloatingPointError(self._error)

    def on_skipped(self, trouble: NonFiniteStep) -> None:
        """Roll back if that is the policy, and report what was done."""
        self._restore_statistics()
        action = self._roll_back() if self.config.policy == "rollback" else "the step was skipped"
        if self._trainer.is_global_zero:
            warn(
                f"{trouble}: {action}, and training continues (callbacks.nonfinite.policy={self.config.policy}; "
                f"{self.count} of at most {self.config.max_steps} such steps). {self._hint}".rstrip()
            )

    def _copy_statistics(self) -> None:
        if not self._statistics_before:
            self._statistics = running_statistics(self._method)
            self._statistics_before = [tensor.clone() for tensor in self._statistics]
        else:
            torch._foreach_copy_(self._statistics_before, self._statistics)

    def _restore_statistics(self) -> None:
        """Undo what the step's forward pass did to batch norms."""
        if self._statistics_before:
            torch._foreach_copy_(self._statistics, self._statistics_before)

    def _roll_back(self) -> str:
        """Load weights, optimizer and the method's state on all ranks; returns a description of what was done."""
        strategy = self._trainer.strategy
        if isinstance(strategy.checkpoint_io, AsyncCheckpointIO):
            strategy.checkpoint_io.wait()  # until the latest file is written
        latest = latest_valid(self.checkpoints) if self._trainer.is_global_zero else None
        path = strategy.broadcast(str(latest[0]) if latest else "")
        if not path:
            return "the step was skipped, as there is no checkpoint yet"
        content = latest[1] if latest else read_checkpoint(Path(path))
        strategy.load_model_state_dict(content, strict=True)
        strategy.load_optimizer_state_dict(content)
        self._method.discard_step()
        return f"weights and optimizer were restored from {path}, step {content['global_step']}"

    # --------------------------------------------------------------------------------------------------------- dump

    def _save(self, trouble: NonFiniteStep) -> tuple[str, str]:
        """Write a file for each rank whose own loss is not finite, for every rank if only gradients are not.

        Returns two parts of a message: the ranks, and what to do with the files.
        """
        culprit = None if trouble.late else self._culprit()
        local_loss = culprit.metrics.local_loss if culprit and culprit.metrics else math.nan
        is_bad = trouble.loss is None or not math.isfinite(local_loss)
        flags = all_gather_concat(torch.tensor([is_bad], dtype=torch.int32, device=self._method.device))
        ranks = [rank for rank, flag in enumerate(flags.tolist()) if flag]
        names = ", ".join(map(str, ranks))
        on_ranks = "" if trouble.loss is None or self._trainer.world_size == 1 else f" on rank {names}"
        if self.saved >= self.config.max_saved:
            return on_ranks, ""
        self.saved += 1
        # On all ranks: the forward pass and `full_state` gather weights.
        ranges = self._record_ranges(culprit) if culprit else ActivationRanges()
        state = full_state(self._method)
        if is_bad:
            content = self._content(trouble, culprit, local_loss, ranges, state)
            try:
                write_step(self._file(trouble, self._trainer.global_rank), content)
            except OSError as error:
                warn(f"a step could not be saved to {self.folder} ({error.strerror or error}).")
        file = self._file(trouble, ranks[0])
        if culprit is None:
            return on_ranks, (
                f"Its weights are in {file}, without images: on a GPU only callbacks.nonfinite.policy=skip or rollback "
                "saves those."
            )
        return on_ranks, f"To see where it begins, run: dino replay {file}"

    def _culprit(self) -> MicroBatch | None:
        """The first micro-batch of the step whose loss is not finite, else its last one."""
        if not self._micro_batches:
            return None
        self._micro_batches[-1].metrics = self._method.metrics.pending[-1]
        bad = (each for each in self._micro_batches if each.metrics and not math.isfinite(each.metrics.local_loss))
        return next(bad, self._micro_batches[-1])

    def _file(self, trouble: NonFiniteStep, rank: int) -> Path:
        return self.folder / f"step{trouble.step:06d}-rank{rank}.pt"

    def _record_ranges(self, micro_batch: MicroBatch) -> ActivationRanges:
        """The ranges of activations, from a second forward pass that has no other effect."""
        method, ranges = self._method, ActivationRanges()
        ranges.add("crops", micro_batch.batch)
        context = self._trainer.precision_plugin.train_step_context
        undisturbed = without_side_effects(method, micro_batch.random)
        with undisturbed, record_ranges(method, forward=ranges), context(), torch.no_grad():
            loss = method.loss(micro_batch.batch)
        ranges.add("loss", loss)
        self._restore_statistics()
        return ranges

    def _content(
        self,
        trouble: NonFiniteStep,
        micro_batch: MicroBatch | None,
        loss: float,
        ranges: ActivationRanges,
        state: dict[str, Tensor],
    ) -> dict[str, Any]:
        method, trainer = self._method, self._trainer
        batch = micro_batch.batch if micro_batch else None
        crops, labels = batch if isinstance(batch, LabeledCrops) else (batch, None)
        return {
            "what": str(trouble),
            "configuration": self.configuration,
            "precision": self.precision,
            "step": trouble.step,
            "epoch": trainer.current_epoch,
            "batch_index": micro_batch.index if micro_batch else -1,
            "seed": self.seed,
            "rank": trainer.global_rank,
            "world_size": trainer.world_size,
            "loss": loss,
            "crops": None if crops is None else [crop.detach().cpu().clone() for crop in crops],
            "labels": None if labels is None else labels.cpu().clone(),
            "random": micro_batch.random if micro_batch else {},
            "state": state,
            "ranges": {name: asdict(values) for name, values in ranges.by_name.items()},
            "schedules": {name: float(method.schedules[name](trouble.step)) for name in method.schedules},
            "lengths": {
                "num_training_batches": int(trainer.num_training_batches),
                "accumulate_grad_batches": trainer.accumulate_grad_batches,
                "total_steps": method.clock.total_steps,
            },
        }


def running_statistics(module: nn.Module) -> list[Tensor]:
    """What a forward pass changes: running means and variances of batch norms, and their counts."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._NormBase)]
    return [tensor for norm in norms for tensor in norm.buffers(recurse=False)]


@contextmanager
def without_side_effects(method: Method, random: dict[str, Tensor | None]) -> Iterator[None]:
    """Within, random numbers start from `random`, and metrics are discarded; both are restored afterwards."""
    metrics, feature_buffer = method.metrics, method.feature_buffer
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
            method.metrics, method.feature_buffer = metrics, feature_buffer
