"""All private attributes of Lightning's trainer that this package uses; only here can an upgrade break them."""

from typing import Any

import lightning as L


def layer_sync(trainer: L.Trainer) -> Any:
    """What synchronizes batch norms (`trainer.sync_batchnorm`), or None. Lightning ignores it for FSDP."""
    return trainer.strategy._layer_sync  # pyright: ignore[reportAttributeAccessIssue]


def skip_sigterm_broadcast(trainer: L.Trainer) -> None:
    """Before every micro-batch, Lightning asks rank 0 whether it received SIGTERM, and waits on the device. Stop that.

    Each rank still checks after every step whether it received the signal itself.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def epoch_metrics(trainer: L.Trainer) -> tuple[int, dict[str, float]]:
    """At the end of an epoch: the step and the metrics that Lightning will log after all callbacks were called."""
    metrics = trainer._logger_connector.metrics["log"]
    step = trainer.fit_loop.epoch_loop._batches_that_stepped - 1
    return step, {name: float(value) for name, value in metrics.items()}
