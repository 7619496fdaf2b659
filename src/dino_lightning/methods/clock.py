"""The position and the length of a run in optimizer steps."""

from dataclasses import dataclass

import lightning as L


@dataclass
class StepClock:
    """A fixed position, for use without a trainer: in tests and to replay one step."""

    step: int = 0
    """Index of the current optimizer step."""
    steps_per_epoch: int = 1
    total_steps: int = 1
    """Optimizer steps of the whole run."""
    total_batch_size: int = 256
    """Images per optimizer step, over all devices and accumulated micro-batches."""
    micro_batch: int = 0
    """Index of the micro-batch within the epoch."""
    rank: int = 0
    is_logging_step: bool = False
    """Whether the metrics of this step are logged."""


class TrainerClock:
    """The same values read from a Lightning trainer while it trains."""

    def __init__(self, trainer: L.Trainer, *, batch_size_per_device: int) -> None:
        self._trainer = trainer
        self._batch_size_per_device = batch_size_per_device

    @property
    def step(self) -> int:
        """Index of the current optimizer step."""
        return self._trainer.global_step

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, including a last step with fewer accumulated micro-batches."""
        return -(-int(self._trainer.num_training_batches) // self._trainer.accumulate_grad_batches)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run. Lightning reads the length of the data loader for it."""
        return int(self._trainer.estimated_stepping_batches)

    @property
    def total_batch_size(self) -> int:
        """Images per optimizer step, over all devices and accumulated micro-batches."""
        return self._batch_size_per_device * self._trainer.world_size * self._trainer.accumulate_grad_batches

    @property
    def micro_batch(self) -> int:
        """Index of the micro-batch within the epoch."""
        return self._trainer.fit_loop.batch_idx

    @property
    def rank(self) -> int:
        """Index of this process among all."""
        return self._trainer.global_rank

    @property
    def is_logging_step(self) -> bool:
        """Whether the metrics of this step are logged."""
        every = self._trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(every) and (self.step + 1) % every == 0
