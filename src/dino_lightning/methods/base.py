"""What every method shares: the student, its schedules, and the only function in which state changes.

That function is `optimizer_step`. It runs once per optimizer step, never once per micro-batch, and in this order: set
the learning rate and weight decay, update the student, call `after_step`, in which the teacher and the method's own
state (for DINO, the center) are updated. A step whose loss or gradient is not finite on any rank changes nothing
(`nonfinite.py`). During all of this `clock.step` is the index of the current step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from dino_lightning.config.duration import Duration
from dino_lightning.data.batch import num_images
from dino_lightning.losses.centering import Centering
from dino_lightning.losses.feature_queue import FeatureQueue
from dino_lightning.methods.clock import StepClock, TrainerClock
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
from dino_lightning.methods.parts import MethodParts
from dino_lightning.models.multi_crop import MultiCropNetwork
from dino_lightning.optim.optimizers import build_optimizer, clip_each_gradient, parameter_groups, unscaling
from dino_lightning.optim.schedules import Cosine
from dino_lightning.runtime.devices import is_asynchronous
from dino_lightning.runtime.lightning_internals import layer_sync, skip_sigterm_broadcast
from dino_lightning.runtime.sharding import shard

GLOBAL_CROPS = 2
"""Number of global crops; they come first in a batch."""
REFERENCE_BATCH = 256
"""Images per optimizer step for which `optim.lr` is specified (linear scaling rule)."""


class Method(L.LightningModule, ABC):
    """A student trained by gradient descent."""

    student: MultiCropNetwork

    def __init__(self, parts: MethodParts, head: nn.Module, *, predictor: nn.Module | None = None) -> None:
        super().__init__()
        self.student = parts.student(head)
        self.predictor = predictor
        """Layers that are trained but belong to no network; None for none."""
        self.optim, self.batch_size_per_device = parts.optim, parts.batch_size_per_device
        self.clock: StepClock | TrainerClock = StepClock()
        """The current step; the trainer's own once training begins."""
        self.description: dict[str, Any] = {}
        """The backbone and its preprocessing, saved in checkpoints so that they can be loaded without a config file."""
        self.metrics = MetricsBuffer()
        self.metric_listeners: list[Callable[[StepMetrics], None]] = []
        """Called with the metrics of every logged step; for callbacks."""
        self.feature_buffer: FeatureBuffer | None = None
        """Receives features and outputs in logging steps, if a callback needs them."""
        self.policy = NonFinitePolicy()
        """What happens after a step whose loss or gradient is not finite; a callback may replace it."""
        self.overflows = OverflowCounter()
        self._nonfinite_step: NonFiniteStep | None = None
        self._sharded = False

    # ---------------------------------------------------------------------------------------- what a method overrides

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """The loss of one micro-batch: V crops (B, C, size, size), the first two global.

        `batch` is a `LabeledCrops` if the method's config has `uses_labels`.
        """

    def extra_schedules(self) -> dict[str, Callable[[int], float]]:
        """Further schedules by name: each is logged, and `self.value(name)` reads it."""
        return {}

    def before_step(self, step: int) -> None:
        """Called once gradients are unscaled and clipped, before the student is updated; may change the gradients."""

    def after_step(self, step: int) -> None:
        """Called after the student is updated; updates everything else that changes once per step."""

    def discard_step(self) -> None:
        """Drop what micro-batches accumulated for a step that is skipped. Handles all centers and queues."""
        for module in self.modules():
            if isinstance(module, Centering | FeatureQueue):
                module.discard()

    @property
    def evaluated_key(self) -> str:
        """Which network is evaluated and exported: `student` or `teacher`."""
        return "student"

    def views_of_networks(self, crops: int) -> tuple[Sequence[int], Sequence[int]]:
        """The indices of the crops that the student processes, and those of the teacher."""
        return range(crops), ()

    # ------------------------------------------------------------------------------------------ networks and schedules

    @property
    def evaluated(self) -> MultiCropNetwork:
        """The network that is evaluated and exported."""
        return getattr(self, self.evaluated_key)

    @property
    def networks(self) -> tuple[MultiCropNetwork, ...]:
        """The student and, if there is one, the teacher."""
        return tuple(child for child in self.children() if isinstance(child, MultiCropNetwork))

    def duration(self, text: str, *, key: str) -> int:
        """A duration of the configuration in optimizer steps."""
        clock = self.clock
        return Duration.parse(text, key=key).steps(steps_per_epoch=clock.steps_per_epoch, total_steps=clock.total_steps)

    def make_schedules(self) -> dict[str, Callable[[int], float]]:
        """All schedules by name, now that the length of the run is known."""
        total, optim = self.clock.total_steps, self.optim  # first: Lightning then reads the data loader's length
        lr = optim.lr * self.clock.total_batch_size / REFERENCE_BATCH
        return {
            "lr": Cosine(lr, optim.lr_end, total, self.duration(optim.lr_warmup, key="optim.lr_warmup")),
            "weight_decay": Cosine(optim.weight_decay, optim.weight_decay_end, total),
            **self.extra_schedules(),
        }

    def value(self, schedule: str) -> float:
        """The schedule's value at the current optimizer step."""
        return self.schedules[schedule](self.clock.step)

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `checkpoints.load_network` needs. Raises instead if the last loss or gradient was not finite."""
        self.flush_metrics()
        checkpoint["readings"] = self.metrics.state_dict()
        checkpoint["overflows"] = float(self.overflows.count)
        checkpoint["evaluated"] = self.evaluated_key
        if self.description:
            checkpoint["network"] = self.description

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the running mean of the epoch's loss."""
        self.metrics.load_state_dict(checkpoint["readings"])
        self.overflows.count = checkpoint["overflows"]

    # ----------------------------------------------------------------------------------------------------------- setup

    def setup(self, stage: str) -> None:
        """Reset what a previous `fit` left behind; runs before a checkpoint is loaded."""
        self.clock = TrainerClock(self.trainer, batch_size_per_device=self.batch_size_per_device)
        self.metrics, self.overflows = MetricsBuffer(), OverflowCounter()
        self.discard_step()

    def configure_model(self) -> None:
        """Shard the weights over the devices if the strategy is FSDP."""
        if self.device_mesh is None or self._sharded:
            return
        self._sharded = True
        if (batch_norm_sync := layer_sync(self.trainer)) is not None:
            batch_norm_sync.apply(self)
        # Backbone and head separately: methods and evaluation call them, not the network that contains them.
        mesh = self.device_mesh["data_parallel"]
        for network in self.networks:
            shard(network.backbone, mesh=mesh)
            shard(network.head, mesh=mesh, in_parts=False)
        if self.predictor is not None:
            shard(self.predictor, mesh=mesh, in_parts=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer over the trained parameters; the schedules are made here, too."""
        self.schedules = self.make_schedules()
        return build_optimizer(self.optim, parameter_groups(self))

    def on_train_start(self) -> None:
        """Avoid a wait for the device before every micro-batch."""
        skip_sigterm_broadcast(self.trainer)

    # ------------------------------------------------------------------------------------------------------- one step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of one micro-batch. Its metrics reach the host before the student is updated (`metrics_buffer`)."""
        pending = self.metrics.pending
        if pending and pending[-1].is_last_micro_batch:
            self.metrics.drain(self._publish)
        logged = self.is_logging_step
        self.metrics.begin(
            step=self.clock.step, epoch=self.trainer.current_epoch, images=num_images(batch), logged=logged
        )
        loss = self.loss(batch)
        if logged:
            for name in self.schedules:
                self.log_metric(f"schedule/{name}", self.value(name))
            if self._scaler is not None:
                for name, value in self.overflows.metrics(self._scaler).items():
                    self.log_metric(name, value)
        self.metrics.start_reduce(loss)
        return loss

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip each parameter's gradient. Under mixed precision Lightning calls this once gradients are unscaled.

        The norms also tell whether all gradients are finite. On a CPU, or if the run continues after such a step, that
        flag is read at once. On a GPU under the policy `stop`, reading it would stall the queue: the device itself
        leaves the weights unchanged, and the host reads the flag together with the next loss.
        """
        if self._nonfinite_step is not None:
            return
        failed = clip_each_gradient(self.parameters(), max_norm=self.optim.clip_grad)
        if failed is not None:
            if self._scaler is not None:
                self.overflows.add(failed)
            elif is_asynchronous(self.device) and not self.policy.continues:
                zero_gradients_if(getattr(optimizer, "optimizer", optimizer), failed)
                self.metrics.gradient_failed = failed
            elif read_now(failed):
                self._skip_step(NonFiniteStep(self.clock.step))
                return
        self.before_step(self.clock.step)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Update all state once, or nothing at all if the loss or a gradient of any rank is not finite."""
        step, self._nonfinite_step = self.clock.step, None
        for group in optimizer.param_groups:
            group["lr"] = self.schedules["lr"](step)
        optimizer.param_groups[0]["weight_decay"] = self.schedules["weight_decay"](step)
        closure = partial(self._run_and_check, optimizer_closure)
        closure = unscaling(closure, optimizer=optimizer, precision=self.trainer.precision_plugin)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        if self._nonfinite_step is None:
            self.after_step(step)
        else:
            self.discard_step()
            self.policy.on_skipped(self._nonfinite_step)

    def _run_and_check(self, forward_and_backward: Callable[[], Any]) -> Any:
        """Run the last micro-batch and check all losses of the step before the student is updated."""
        result = forward_and_backward()
        self.metrics.wait()
        self.metrics.pending[-1].is_last_micro_batch = True
        self._raise_if_gradient_failed()
        nonfinite = first_nonfinite(self.metrics.pending)
        if nonfinite is None:
            return result
        self._skip_step(nonfinite)
        return None  # to a loss scaler this means that there was no backward pass, so it keeps its scale

    def _skip_step(self, nonfinite: NonFiniteStep) -> None:
        self.policy.on_nonfinite(nonfinite)
        self._nonfinite_step = nonfinite
        for metrics in self.metrics.pending:
            metrics.skipped = True
        drop_gradients(self)

    def _raise_if_gradient_failed(self) -> None:
        """End the run if the gradient of the previous step was not finite; see `configure_gradient_clipping`."""
        if self.metrics.gradients_failed:
            self.policy.on_nonfinite(NonFiniteStep(self.clock.step - 1, late=True))

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler; None unless training in fp16."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    # --------------------------------------------------------------------------------------------------------- metrics

    @property
    def is_logging_step(self) -> bool:
        """Whether the metrics of this step are logged; other steps need not compute them."""
        return self.clock.is_logging_step

    def log_metric(self, name: str, value: Tensor | float) -> None:
        """Log a metric of this micro-batch in logging steps. Unlike `self.log`, it never waits for the device.

        A tensor must be a scalar and be logged within `loss`; a number can be logged until the micro-batch ends.
        """
        self.metrics.record(name, value)

    def flush_metrics(self) -> None:
        """Write the metrics of all steps taken, on all ranks together; raises if the last step was not finite."""
        self.metrics.flush(self._publish)
        self._raise_if_gradient_failed()

    def _publish(self, metrics: StepMetrics) -> None:
        if not metrics.skipped:
            nonfinite = first_nonfinite([metrics])
            if nonfinite is not None:
                NonFinitePolicy().on_nonfinite(nonfinite)
            # For callbacks that monitor the loss of a step: a tensor on the CPU, which can be read without waiting.
            self.trainer.callback_metrics["train/loss"] = torch.full((), metrics.loss)
        if metrics.is_last_micro_batch and (metrics.logged or self.trainer.should_stop):
            for logger in self.trainer.loggers:
                logger.log_metrics(metrics.row(), step=metrics.step)
                logger.save()
            for listener in () if metrics.skipped else self.metric_listeners:
                listener(metrics)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the metrics of the last step of an epoch or of the run; no other step follows that would."""
        trainer = self.trainer
        if trainer.is_last_batch or trainer.should_stop or self.clock.step == trainer.max_steps:
            self.flush_metrics()

    def on_train_epoch_end(self) -> None:
        """Log the mean loss of the epoch."""
        self.flush_metrics()
        mean = self.metrics.pop_epoch_mean()
        if mean is not None:
            self.log("train/loss_epoch", mean, sync_dist=True)
