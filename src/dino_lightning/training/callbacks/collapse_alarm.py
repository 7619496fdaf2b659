"""Collapse alarm: detects and names a collapse, proposes what to change and, with `stop`, ends the run."""

import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any

import lightning as L

from dino_lightning.config import CollapseConfig
from dino_lightning.methods.base import Method
from dino_lightning.methods.collapse import KINDS, CollapseKind, changes, diagnose
from dino_lightning.methods.feature_buffer import FeatureBuffer
from dino_lightning.methods.metrics_buffer import StepMetrics

MAX_CHANGES = 3
"""Proposals in a warning."""
PREFIX = "collapse/"


class CollapseAlarm(L.Callback):
    """Diagnoses the mean of the last `patience` logged rows, and logs `collapse/alarm` (0 or 1) in the next row.

    At the end of an epoch it logs `collapse/effective_rank` and `collapse/dead_prototypes`. All ranks have the same
    metrics, so they reach the same diagnosis without communication.
    """

    def __init__(self, config: CollapseConfig) -> None:
        self.config = config
        self.kind: CollapseKind | None = None
        """The current collapse."""
        self.first_steps: dict[str, int] = {}
        """The kinds of collapse so far, and the step at which each was first detected."""
        self._rows: deque[dict[str, float]] = deque(maxlen=config.patience)
        self._effective_rank: float | None = None
        self._spread_at_start: float | None = None
        self._warned: set[CollapseKind] = set()
        self._listener: Callable[[StepMetrics], None] | None = None

    @property
    def verdict(self) -> str | None:
        """All collapses so far with their steps, for `summary.json`."""
        return ", ".join(f"{name} at step {step}" for name, step in self.first_steps.items()) or None

    def state_dict(self) -> dict[str, Any]:
        """Plain types only, so that `torch.load` reads the checkpoint with `weights_only=True`."""
        return {
            "kind": self.kind.name if self.kind else None,
            "first_steps": dict(self.first_steps),
            "rows": [dict(row) for row in self._rows],
            "effective_rank": self._effective_rank,
            "spread_at_start": self._spread_at_start,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the rows of the resumed run."""
        self.kind = KINDS.get(state_dict["kind"])
        self.first_steps = dict(state_dict["first_steps"])
        self._rows = deque(state_dict["rows"], maxlen=self.config.patience)
        self._effective_rank, self._spread_at_start = state_dict["effective_rank"], state_dict["spread_at_start"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Subscribe to the metrics of each logged step, and make the method collect features."""
        pl_module.feature_buffer = FeatureBuffer()
        self._listener = partial(self._on_metrics, trainer, pl_module)
        pl_module.metric_listeners.append(self._listener)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log whether there is a collapse."""
        pl_module.log_metric(PREFIX + "alarm", float(self.kind is not None))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the statistics that need more than one batch."""
        buffer: FeatureBuffer = pl_module.feature_buffer
        rank, dead = buffer.take_effective_rank(), buffer.take_dead_prototypes()
        self._effective_rank = self._effective_rank if rank is None else rank
        for name, value in (("effective_rank", rank), ("dead_prototypes", dead)):
            if value is not None:
                # All ranks have the same value, and "max" keeps it exactly.
                pl_module.log(PREFIX + name, value, reduce_fx="max", sync_dist=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any, exception: BaseException | None = None) -> None:
        """Unsubscribe, also after an exception."""
        if self._listener is not None:
            pl_module.metric_listeners.remove(self._listener)
        self._listener = pl_module.feature_buffer = None

    on_exception = on_train_end

    def _on_metrics(self, trainer: L.Trainer, method: Method, metrics: StepMetrics) -> None:
        row = {name.removeprefix(PREFIX): value for name, value in metrics.values.items() if name.startswith(PREFIX)}
        row.pop("alarm", None)
        if not row:  # the last row before a stop has only the loss
            return
        if self._spread_at_start is None:
            self._spread_at_start = row.get("feature_std")
        if metrics.step < method.duration(self.config.after, key="callbacks.collapse.after"):
            return
        self._rows.append(row if self._effective_rank is None else {**row, "effective_rank": self._effective_rank})
        if len(self._rows) == self.config.patience:
            self._diagnose(trainer, method, step=metrics.step)

    def _diagnose(self, trainer: L.Trainer, method: Method, *, step: int) -> None:
        names = set.intersection(*(set(row) for row in self._rows))
        mean = {name: fmean(row[name] for row in self._rows) for name in names}
        width = method.feature_buffer.width if method.feature_buffer else 0
        start = {} if self._spread_at_start is None else {"spread_at_start": self._spread_at_start}
        self.kind = diagnose(mean, width=width, **start)
        if self.kind is None:
            return
        self.first_steps.setdefault(self.kind.name, step)
        if self.kind not in self._warned:
            self._warned.add(self.kind)
            if trainer.is_global_zero:
                # Not through a rich console: only output to stderr appears above the progress bar.
                print(warning(self.kind, method, step=step, stop=self.config.stop), file=sys.stderr, flush=True)
        if self.config.stop:
            trainer.should_stop = True


def warning(kind: CollapseKind, method: Method, *, step: int, stop: bool) -> str:
    """The message about a collapse."""
    proposals = changes(kind, method_settings(method), method=type(method).__name__)[:MAX_CHANGES]
    end = (
        "The run ends here (callbacks.collapse.stop=true)" if stop else "callbacks.collapse.stop=true would end the run"
    )
    return (
        f"Collapse at step {step}, {kind.name}: {kind.what}. Try, in this order: {'; '.join(proposals)}. "
        f"{end}; more in docs/collapse.md."
    )


def method_settings(method: Method) -> dict[str, Any]:
    """The part of the configuration that a method knows, by dotted key."""
    config = getattr(method, "config", None)
    settings = {f"method.{key}": value for key, value in vars(config).items()} if hasattr(config, "__dict__") else {}
    settings |= {f"optim.{key}": value for key, value in vars(method.optim).items()}
    return {**settings, "data.batch_size_per_device": method.batch_size_per_device}
