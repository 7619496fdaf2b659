"""Collapse alarms: names the kind, says what to change and, if asked to, ends the run."""

import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any, cast

import lightning as L

from dino_lightning.config import CollapseConfig
from dino_lightning.methods.base import Method
from dino_lightning.methods.collapse import KINDS, CollapseKind, changes, diagnose
from dino_lightning.methods.feature_buffer import FeatureBuffer
from dino_lightning.methods.metrics_buffer import StepMetrics

MOST_CHANGES = 3
"""Proposals in a warning."""
PREFIX = "collapse/"


class CollapseAlarm(L.Callback):
    """Judges the mean of the last `patience` rows of the log, and logs `collapse/alarm` (0 or 1) in the next row.

    At the end of an epoch it logs `collapse/effective_rank` and `collapse/dead_prototypes`. All ranks have the same
    signals, so they come to the same verdict without an exchange.
    """

    def __init__(self, config: CollapseConfig) -> None:
        self.config = config
        self.kind: CollapseKind | None = None
        """The collapse at the moment."""
        self.found: dict[str, int] = {}
        """Names of all kinds that were found, and the steps."""
        self._rows: deque[dict[str, float]] = deque(maxlen=config.patience)
        self._rank: float | None = None
        self._spread_at_start: float | None = None
        self._said: set[CollapseKind] = set()
        self._watch: Callable[[StepMetrics], None] | None = None

    @property
    def verdict(self) -> str | None:
        """What was found and when, for `summary.json`."""
        return ", ".join(f"{name} at step {step}" for name, step in self.found.items()) or None

    def state_dict(self) -> dict[str, Any]:
        """Plain types only, so that `torch.load` reads the checkpoint with `weights_only=True`."""
        return {
            "kind": self.kind.name if self.kind else None,
            "found": dict(self.found),
            "rows": [dict(row) for row in self._rows],
            "rank": self._rank,
            "spread_at_start": self._spread_at_start,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run that is resumed was."""
        self.kind = KINDS.get(state_dict["kind"])
        self.found = dict(state_dict["found"])
        self._rows = deque(state_dict["rows"], maxlen=self.config.patience)
        self._rank, self._spread_at_start = state_dict["rank"], state_dict["spread_at_start"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start to listen."""
        method = cast(Method, pl_module)
        method.feature_buffer = FeatureBuffer()
        self._watch = partial(self._see, trainer, method)
        method.metric_listeners.append(self._watch)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log whether there is a collapse."""
        pl_module.log_metric(PREFIX + "alarm", float(self.kind is not None))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what takes more than one batch to know."""
        window = cast(Method, pl_module).feature_buffer
        assert window is not None
        rank, dead = window.take_effective_rank(), window.take_dead_prototypes()
        self._rank = self._rank if rank is None else rank
        for name, value in (("effective_rank", rank), ("dead_prototypes", dead)):
            if value is not None:
                # All ranks have the same; "max" keeps it to the last bit.
                pl_module.log(PREFIX + name, value, reduce_fx="max", sync_dist=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop to listen."""
        self._leave(cast(Method, pl_module))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop to listen."""
        self._leave(cast(Method, pl_module))

    def _leave(self, method: Method) -> None:
        if self._watch is not None:
            method.metric_listeners.remove(self._watch)
        self._watch = method.feature_buffer = None

    def _see(self, trainer: L.Trainer, method: Method, reading: StepMetrics) -> None:
        """Judge a row."""
        row = {name.removeprefix(PREFIX): value for name, value in reading.values.items() if name.startswith(PREFIX)}
        row.pop("alarm", None)
        if not row:  # the last row before a stop has the loss alone
            return
        if self._spread_at_start is None:
            self._spread_at_start = row.get("feature_std")
        if reading.step < method.duration(self.config.after, key="callbacks.collapse.after"):
            return
        self._rows.append(row if self._rank is None else {**row, "effective_rank": self._rank})
        if len(self._rows) == self.config.patience:
            self._judge(trainer, method, step=reading.step)

    def _judge(self, trainer: L.Trainer, method: Method, *, step: int) -> None:
        known = set.intersection(*(set(row) for row in self._rows))
        mean = {name: fmean(row[name] for row in self._rows) for name in known}
        width = method.feature_buffer.width if method.feature_buffer else 0
        start = {} if self._spread_at_start is None else {"spread_at_start": self._spread_at_start}
        self.kind = diagnose(mean, width=width, **start)
        if self.kind is None:
            return
        self.found.setdefault(self.kind.name, step)
        if self.kind not in self._said:
            self._said.add(self.kind)
            if trainer.is_global_zero:
                # Not by a console of rich: the bar passes on what goes to stderr, and only that stands above it.
                print(_sentence(self.kind, method, step=step, stop=self.config.stop), file=sys.stderr, flush=True)
        if self.config.stop:
            trainer.should_stop = True


def _sentence(kind: CollapseKind, method: Method, *, step: int, stop: bool) -> str:
    proposals = changes(kind, _settings(method), method=type(method).__name__)[:MOST_CHANGES]
    end = (
        "The run ends here (callbacks.collapse.stop=true)" if stop else "callbacks.collapse.stop=true would end the run"
    )
    return (
        f"Collapse at step {step}, {kind.name}: {kind.what}. Try, in this order: {'; '.join(proposals)}. "
        f"{end}; more in docs/collapse.md."
    )


def _settings(method: Method) -> dict[str, Any]:
    """What a method knows of its configuration, by dotted names."""
    config = getattr(method, "config", None)
    settings = {f"method.{key}": value for key, value in vars(config).items()} if hasattr(config, "__dict__") else {}
    settings |= {f"optim.{key}": value for key, value in vars(method.optim).items()}
    return {**settings, "data.batch_size_per_device": method.batch_size_per_device}
