"""What every method shares: a student, schedules, and one place where state moves.

`optimizer_step` is that place. In this order, once per optimizer step and never per micro-batch: write the learning
rate and weight decay, step the student, move the teacher if there is one, let the method move its own state (DINO: the
center). A step whose loss or gradient is not finite on any rank moves none of these (`nonfinite.py`). `global_step` has
the index of the step just taken throughout.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from dino_lightning.config import OptimConfig
from dino_lightning.config.duration import Duration
from dino_lightning.data.batch import images_in
from dino_lightning.losses.centering import Centering
from dino_lightning.losses.feature_queue import FeatureQueue
from dino_lightning.methods.feature_buffer import FeatureBuffer
from dino_lightning.methods.metrics_buffer import MetricsBuffer, StepMetrics, read_now
from dino_lightning.methods.nonfinite import (
    NonFinitePolicy,
    NonFiniteStep,
    OverflowCounter,
    drop_gradients,
    first_nonfinite,
    zero_gradients_if,
)
from dino_lightning.models.multi_crop import MultiCropNetwork
from dino_lightning.optim.optimizers import build_optimizer, clip_each_gradient, parameter_groups, unscaling
from dino_lightning.optim.schedules import Cosine
from dino_lightning.runtime.devices import is_asynchronous
from dino_lightning.runtime.sharding import shard

GLOBAL_CROPS = 2
"""The first crops of a batch, which are global."""
REFERENCE_BATCH = 256
"""Images per optimizer step for which `optim.lr` is given (linear scaling rule)."""


class Method(L.LightningModule, ABC):
    """A student trained by gradient."""

    student: MultiCropNetwork

    def __init__(
        self,
        student: MultiCropNetwork,
        *,
        optim: OptimConfig,
        batch_size_per_device: int,
        predictor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.predictor = predictor
        """Layers that are trained and stand in no network; None for none."""
        self.optim = optim
        self.batch_size_per_device = batch_size_per_device
        self.description: dict[str, Any] = {}
        """The backbone and its images in plain types, so that a checkpoint alone says what its weights belong to."""
        self.metrics = MetricsBuffer()
        self.metric_listeners: list[Callable[[StepMetrics], None]] = []
        """Called with every reading that is logged; for callbacks."""
        self.feature_buffer: FeatureBuffer | None = None
        """Where logging steps leave features and outputs, if a callback wants them."""
        self.policy = NonFinitePolicy()
        """What follows a step whose loss or gradient is not finite; for a callback."""
        self.overflows = OverflowCounter()
        self._nonfinite_step: NonFiniteStep | None = None
        self._sharded = False

    # ------------------------------------------------------------------------------------- what a method adds

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """The loss of one micro-batch: V crops (B, 3, size, size), the first two global.

        Where the method wants labels, a `LabeledCrops`.
        """

    def method_schedules(self) -> dict[str, Callable[[int], float]]:
        """The method's own schedules by name; they are logged and readable as `self.value(name)`."""
        return {}

    def after_clip(self, step: int) -> None:
        """Change gradients after they are unscaled and clipped."""

    def after_step(self, step: int) -> None:
        """Move the method's own state, after student and teacher have moved."""

    def discard_step(self) -> None:
        """Drop what micro-batches have left for a step that is not taken; centers and queues are known here."""
        for module in self.modules():
            if isinstance(module, Centering | FeatureQueue):
                module.discard()

    # ---------------------------------------------------------------------------------- what a kind of method adds

    @property
    def evaluated(self) -> MultiCropNetwork:
        """The network whose features are evaluated and exported."""
        return self.student

    @property
    def evaluated_key(self) -> str:
        """Its name in a checkpoint, `teacher` or `student`."""
        return "student" if self.evaluated is self.student else "teacher"

    @property
    def networks(self) -> tuple[MultiCropNetwork, ...]:
        """All networks, to be spread over devices."""
        return (self.student,)

    def views_of_networks(self, crops: int) -> tuple[Sequence[int], Sequence[int]]:
        """Which of so many crops the student sees, and which the teacher."""
        return range(crops), ()

    def kind_schedules(self) -> dict[str, Callable[[int], float]]:
        """Schedules of this kind of method."""
        return {}

    def before_student(self, step: int) -> None:
        """Called before the student moves."""

    def after_student(self, step: int) -> None:
        """Called when the student has moved."""

    # ------------------------------------------------------------------------------------------------ schedules

    @property
    def total_batch_size(self) -> int:
        """Images per optimizer step, over all devices and accumulated micro-batches."""
        return self.batch_size_per_device * self.trainer.world_size * self.trainer.accumulate_grad_batches

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, the last, shorter window of accumulation included."""
        micro_batches, window = int(self.trainer.num_training_batches), self.trainer.accumulate_grad_batches
        return -(-micro_batches // window)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int(self.trainer.estimated_stepping_batches)

    def duration(self, text: str, *, key: str) -> int:
        """A duration of the configuration in optimizer steps."""
        return Duration.parse(text, key=key).steps(steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps)

    def _make_schedules(self) -> dict[str, Callable[[int], float]]:
        total, optim = self.total_steps, self.optim  # total_steps first: asking for it makes Lightning read the loader
        lr = optim.lr * self.total_batch_size / REFERENCE_BATCH
        return {
            "lr": Cosine(lr, optim.lr_end, total, self.duration(optim.lr_warmup, key="optim.lr_warmup")),
            "weight_decay": Cosine(optim.weight_decay, optim.weight_decay_end, total),
            **self.kind_schedules(),
            **self.method_schedules(),
        }

    def value(self, schedule: str) -> float:
        """The schedule's value at the current optimizer step."""
        return self.schedules[schedule](self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `checkpoints.load_network` wants to know; no file is written after a loss that is not finite."""
        self.flush_metrics()
        checkpoint["readings"] = self.metrics.state_dict()
        checkpoint["overflows"] = float(self.overflows.count)
        checkpoint["evaluated"] = self.evaluated_key
        if self.description:
            checkpoint["network"] = self.description

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the mean loss of the epoch."""
        if "readings" in checkpoint:  # not in files of older versions
            self.metrics.load_state_dict(checkpoint["readings"])
            self.overflows.count = checkpoint.get("overflows", 0.0)

    # ----------------------------------------------------------------------------------------------------- step

    def setup(self, stage: str) -> None:
        """Forget what another fit has left, before a checkpoint is read."""
        self.metrics, self.overflows = MetricsBuffer(), OverflowCounter()
        self.discard_step()

    def configure_model(self) -> None:
        """Spread the weights over the devices where the strategy is FSDP."""
        if self.device_mesh is None or self._sharded:
            return
        self._sharded = True
        synchronized = self.trainer.strategy._layer_sync  # pyright: ignore[reportAttributeAccessIssue]
        if synchronized is not None:  # `trainer.sync_batchnorm`, which Lightning forgets under this strategy
            synchronized.apply(self)
        # Backbone and head each by itself: methods and evaluation call them, not the network around them.
        mesh = self.device_mesh["data_parallel"]
        for network in self.networks:
            shard(network.backbone, mesh=mesh)
            shard(network.head, mesh=mesh, in_parts=False)
        if self.predictor is not None:
            shard(self.predictor, mesh=mesh, in_parts=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer over what is trained, and the schedules, now that the length of the run is known."""
        self.schedules = self._make_schedules()
        return build_optimizer(self.optim, parameter_groups(self))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one micro-batch. What it measures is read before the student moves (see `readings`)."""
        waiting = self.metrics.pending
        if waiting and waiting[-1].is_last_micro_batch:
            self.metrics.drain(self._publish)
        logged = self.is_logging_step
        now = {"step": self.global_step, "epoch": self.trainer.current_epoch, "images": images_in(batch)}
        self.metrics.begin(**now, logged=logged)
        loss = self.loss(batch)
        if logged:
            for name in self.schedules:
                self.log_metric(f"schedule/{name}", self.value(name))
            if self._scaler is not None:
                for name, figure in self.overflows.figures(self._scaler).items():
                    self.log_metric(name, figure)
        self.metrics.start_reduce(loss)
        return loss

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip tensor by tensor. Lightning calls this after gradients are unscaled under mixed precision.

        The norms tell whether all gradients are finite. Where a wait for the device costs nothing, or the run is to go
        on, that is read here; on a GPU under the policy `stop`, the device keeps a bad step from the weights, and the
        program learns of it with the next loss.
        """
        if self._nonfinite_step is not None:
            return
        failed = clip_each_gradient(self.parameters(), max_norm=self.optim.clip_grad)
        if failed is not None and self._scaler is not None:
            self.overflows.add(failed)
        elif failed is not None and (self.policy.continues or not is_asynchronous(self.device)):
            if read_now(failed):
                self._skip_step(NonFiniteStep(self.global_step))
                return
        elif failed is not None:
            zero_gradients_if(getattr(optimizer, "optimizer", optimizer), failed)
            self.metrics.gradient_failed = failed
        self.after_clip(self.global_step)
        self.before_student(self.global_step)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Move everything that moves, once; or nothing, where the loss or a gradient of any rank is not finite."""
        step, self._nonfinite_step = self.global_step, None
        for group in optimizer.param_groups:
            group["lr"] = self.schedules["lr"](step)
        optimizer.param_groups[0]["weight_decay"] = self.schedules["weight_decay"](step)
        closure = partial(self._before_the_step, optimizer_closure)
        closure = unscaling(closure, optimizer=optimizer, precision=self.trainer.precision_plugin)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        if self._nonfinite_step is not None:
            self.discard_step()
            self.policy.on_skipped(self._nonfinite_step)
            return
        self.after_student(step)
        self.after_step(step)

    def _before_the_step(self, forward_and_backward: Callable[[], Any]) -> Any:
        """The last micro-batch's passes, and what has to be known before the student moves."""
        result = forward_and_backward()
        self.metrics.wait()
        waiting = self.metrics.pending
        waiting[-1].is_last_micro_batch = True
        if self.metrics.gradients_failed:
            self.policy.on_nonfinite(NonFiniteStep(self.global_step - 1, late=True))
        trouble = first_nonfinite(waiting)
        if trouble is not None:
            self._skip_step(trouble)
            return None  # to a loss scale that means: no backward pass, so it stays as it is
        return result

    def _skip_step(self, trouble: NonFiniteStep) -> None:
        self.policy.on_nonfinite(trouble)
        self._nonfinite_step = trouble
        for reading in self.metrics.pending:
            reading.skipped = True
        drop_gradients(self)

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        """Of fp16, where it trains in that."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    # --------------------------------------------------------------------------------------- what a step measures

    @property
    def is_logging_step(self) -> bool:
        """Whether this step's metrics are written, so that the others need not be computed."""
        every = getattr(self._trainer, "log_every_n_steps", 0)  # none outside training, as in a test
        return bool(every) and (self.global_step + 1) % every == 0

    def log_metric(self, name: str, value: Tensor | float) -> None:
        """Log a figure of this micro-batch in logging steps. Unlike `self.log`, it does not make the program wait.

        A tensor must be a scalar and come from within `loss`; numbers may come until the micro-batch ends.
        """
        self.metrics.record(name, value)

    def flush_metrics(self) -> None:
        """Write the rows of steps taken, on all ranks together; after a step that ended the run, raise that again."""
        self.metrics.flush(self._publish)
        if self.metrics.gradients_failed:
            self.policy.on_nonfinite(NonFiniteStep(self.global_step - 1, late=True))

    def _publish(self, reading: StepMetrics) -> None:
        kept = not reading.skipped
        if kept and (trouble := first_nonfinite([reading])) is not None:
            NonFinitePolicy().on_nonfinite(trouble)
        if kept:
            # For callbacks that monitor the loss of a step: a tensor on the CPU, which nobody has to wait for.
            self.trainer.callback_metrics["train/loss"] = torch.full((), reading.loss)
        if reading.is_last_micro_batch and (reading.logged or self.trainer.should_stop):
            for logger in self.trainer.loggers:
                logger.log_metrics(reading.row(), step=reading.step)
                logger.save()
            for watch in self.metric_listeners if kept else ():
                watch(reading)

    def on_train_start(self) -> None:
        """No question to rank 0 before each micro-batch."""
        # Lightning asks rank 0 before every micro-batch whether it was told to end, and waits on the device for the
        # answer. Each rank still looks after every step whether it was told so itself.
        self.trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Collect at once what the last step of an epoch or of the run has measured: no other one does."""
        trainer = self.trainer
        if trainer.is_last_batch or trainer.should_stop or self.global_step == trainer.max_steps:
            self.flush_metrics()

    def on_train_epoch_end(self) -> None:
        """Log the mean loss of the epoch."""
        self.flush_metrics()
        mean = self.metrics.pop_epoch_mean()
        if mean is not None:
            self.log("train/loss_epoch", mean, sync_dist=True)


def _nothing() -> None:
    pass
