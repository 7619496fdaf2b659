"""Weights & Biases as a logger whose trouble is not that of the run: at its start, on the way or at its end."""

import hashlib
import netrc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from dino_lightning.config import WandbLoggerConfig
from dino_lightning.runtime.console import warn
from dino_lightning.runtime.files import write_atomically

DEFAULT_HOST = "https://api.wandb.ai"
STEP_METRIC = "trainer/global_step"
"""Lightning's name for the optimizer step, the x axis of all charts."""
RUN_ID_FILE = "wandb_run_id.txt"
"""In the folder of a run: its id at W&B."""


class FaultTolerantWandbLogger(WandbLogger):
    """Lightning's logger, but a run starts where W&B cannot be reached, and goes on when W&B's own process is gone.

    That process dies of the signals that a scheduler sends to all processes of a job, when the run itself has yet to
    save, and of the lack of memory. Signals can't be kept from it: it asks for them itself.
    """

    lost = False
    """Whether something could not be sent; nothing is, from then on."""
    started: ClassVar["FaultTolerantWandbLogger | None"] = None
    """The one that `closed_wandb` will close."""

    @rank_zero_only
    def start(self, *, best: Sequence[str] = ()) -> None:
        """Start W&B's run; offline, where it is to be online and cannot. `best` are metrics whose maximum counts."""
        problem = None
        if self._wandb_init.get("mode") == "online":
            problem = missing_key_message()  # W&B would ask for one, and wait for an answer
            if problem is None:
                try:
                    _ = self.experiment
                except Exception as error:
                    problem = _reason(error)
        if problem is not None:
            self._go_offline(problem)
        FaultTolerantWandbLogger.started = self
        for name in best:
            self.experiment.define_metric(name, step_metric=STEP_METRIC, step_sync=True, summary="max")

    def _go_offline(self, problem: str) -> None:
        wandb.teardown(exit_code=1)  # its process holds the id of the run that did not start
        self._experiment, self._wandb_init["mode"] = None, "offline"
        path = Path(self.save_dir or ".") / "wandb" / f"offline-run-*-{self.version}"
        warn(f"logger.mode=online: {problem}; the run goes on offline, and `wandb sync {path}` uploads it later.")

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
    def conclude(self, summary: Mapping[str, Any], *, weights: Path | None) -> None:
        """Show `summary`, plain types, as the run's, and upload exported weights with it as an artifact, `model`."""
        if self.lost:
            return
        try:
            self.experiment.summary.update({f"summary/{name}": value for name, value in summary.items()})
            if weights is None:
                return
            artifact = wandb.Artifact(weights_name(self.experiment.id), type="model", metadata=dict(summary))
            artifact.add_file(str(weights))
            self.experiment.log_artifact(artifact)
        except Exception as error:
            self._lose(error)

    @rank_zero_only
    def finish(self, *, failed: bool = False) -> None:
        """Close the run: the next job of a sweep is another one."""
        if self.lost or self._experiment is None:
            return
        try:
            self.experiment.finish(exit_code=int(failed))
            self._experiment = None  # whoever leaves by a signal has closed it already
        except Exception as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        self.lost = True
        warn(
            f"W&B's process does not answer ({_reason(error)}); training goes on, and metrics.csv has all rows. A "
            "start with resume=true goes on with the charts."
        )


@contextmanager
def wandb_session() -> Iterator[None]:
    """Close the run that is started within, however the block ends: the next job of a sweep is another one at W&B."""
    failed = True
    try:
        yield
        failed = False
    finally:
        logger, FaultTolerantWandbLogger.started = FaultTolerantWandbLogger.started, None
        if logger is not None:
            logger.finish(failed=failed)


def wandb_logger(
    config: WandbLoggerConfig, *, folder: Path, run_id: str | None, name: str, group: str | None, job_type: str
) -> FaultTolerantWandbLogger:
    """The logger of a run that writes to `folder`; `start` starts it. `name` and `group` are used where none is set."""
    if config.mode != "online":  # W&B sends statistics of its own use also then, unless told not to
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    timeouts: dict[str, Any] = {"init_timeout": config.start_timeout_s, "finish_timeout": config.end_timeout_s}
    known = {key: value for key, value in timeouts.items() if key in wandb.Settings.model_fields}
    logger = FaultTolerantWandbLogger(
        entity=config.entity,
        project=config.project,
        name=config.name or name,
        group=config.group or group,
        tags=config.tags,
        mode=config.mode,
        save_dir=folder,
        id=run_id,
        resume="allow",
        job_type=job_type,
        settings=wandb.Settings(**known),
    )
    logger._wandb_init.pop("anonymous")  # W&B says of each run that it has no such setting any more
    return logger


def wandb_run_id(output: Path, *, resume: bool) -> str:
    """The W&B id of the run in this output folder; a resumed run keeps its id."""
    file = output / RUN_ID_FILE
    if resume and file.exists():
        return file.read_text().strip()
    is_first = rank_zero_only.rank == 0  # pyright: ignore[reportFunctionMemberAccess]
    started = str(time.time_ns()) if is_first else ""
    run_id = hashlib.sha256(f"{output.absolute()} {started}".encode()).hexdigest()[:12]
    if is_first:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(file, run_id + "\n")
    return run_id


def sweep_name() -> str | None:
    """Name of the folder of the sweep (`--multirun`) that this run belongs to; None where it is none."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return Path(HydraConfig.get().sweep.dir).name


def weights_name(run_id: str) -> str:
    """Name of the artifact with the exported weights of a run."""
    return f"weights-{run_id}"


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text}"


def missing_key_message() -> str | None:
    """What to do about a key that is missing; None where there is one."""
    host = os.environ.get("WANDB_BASE_URL", DEFAULT_HOST)
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _in_netrc(host):
        return None
    return f"no key for {host} is known (`wandb login` or WANDB_API_KEY)"


def _in_netrc(host: str) -> bool:
    paths = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for path in (Path(path).expanduser() for path in paths):
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(str(path)).authenticators(urlsplit(host).hostname or host):
                return True
    return False
