"""Weights & Biases as a logger whose end is not the end of the run."""

from collections.abc import Mapping

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from dino_lightning.quiet import warn


class LastingWandbLogger(WandbLogger):
    """Lightning's logger, but a run goes on when W&B's own process is gone.

    That process dies of the signals that a scheduler sends to all processes of a job, when the run itself has yet to
    save, and of the lack of memory. Signals can't be kept from it: it asks for them itself. What happens at its start
    is still an error.
    """

    lost = False
    """Whether something could not be sent; nothing is, from then on."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send a row. Pictures come this way too."""
        if self.lost:
            return
        try:
            super().log_metrics(metrics, step)
        except Exception as error:
            self._lose(error)

    @rank_zero_only
    def finish(self) -> None:
        """Close the run: the next job of a sweep is another one."""
        if self.lost or self._experiment is None:
            return
        try:
            self.experiment.finish()
        except Exception as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        self.lost = True
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warn(f"W&B's process does not answer ({reason}); training goes on, and metrics.csv has all rows. A start with "
             "resume=true goes on with the charts.")  # fmt: skip
