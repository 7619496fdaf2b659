"""A Weights & Biases logger whose failures never end the run, at its start, during it or at its end."""

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
"""File in a run's folder with its W&B id."""


class FaultTolerantWandbLogger(WandbLogger):
    """Lightning's logger, but the run starts if W&B is unreachable and continues if W&B's process dies.

    That process can run out of memory, and it dies of the signals that a scheduler sends to all processes of a job,
    while the run still has to save. They cannot be blocked, because it installs its own handlers.
    """

    disconnected = False
    """Whether sending failed; nothing is sent afterwards."""
    started: ClassVar["FaultTolerantWandbLogger | None"] = None
    """The logger that `wandb_session` will close."""

    @rank_zero_only
    def start(self, *, best: Sequence[str] = ()) -> None:
        """Start the W&B run, offline if W&B is unreachable. `best` are metrics summarized by their maximum."""
        problem = None
        if self._wandb_init.get("mode") == "online":
            problem = missing_key_message()  # W&B would ask for one and wait
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
        wandb.teardown(exit_code=1)  # its process still has the id of the failed run
        self._experiment, self._wandb_init["mode"] = None, "offline"
        path = Path(self.save_dir or ".") / "wandb" / f"offline-run-*-{self.version}"
        warn(f"logger.mode=online: {problem}; the run continues offline. Upload it later with `wandb sync {path}`.")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send metrics or pictures."""
        if not self.disconnected:
            with self._tolerant():
                super().log_metrics(metrics, step)

    @rank_zero_only
    def log_summary(self, summary: Mapping[str, Any], *, weights: Path | None) -> None:
        """Set the run's summary and upload its exported weights as an artifact of type `model`."""
        if self.disconnected:
            return
        with self._tolerant():
            self.experiment.summary.update({f"summary/{name}": value for name, value in summary.items()})
            if weights is not None:
                artifact = wandb.Artifact(weights_name(self.experiment.id), type="model", metadata=dict(summary))
                artifact.add_file(str(weights))
                self.experiment.log_artifact(artifact)

    @rank_zero_only
    def finish(self, *, failed: bool = False) -> None:
        """Close the run, so that the next job of a sweep starts its own."""
        if self.disconnected or self._experiment is None:
            return
        with self._tolerant():
            self.experiment.finish(exit_code=int(failed))
            self._experiment = None  # so that a second call does nothing

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """Disconnect on any error of W&B."""
        try:
            yield
        except Exception as error:
            self.disconnected = True
            warn(
                f"W&B's process does not respond ({_reason(error)}); training continues and metrics.csv has all rows. "
                "resume=true continues the charts."
            )


@contextmanager
def wandb_session() -> Iterator[None]:
    """Close the W&B run that was started in the block, also after an error; each job of a sweep is a separate run."""
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
    """The logger of a run in `folder`; call `start` to start it. `name` and `group` apply if the config sets none."""
    if config.mode != "online":  # W&B would send usage statistics even offline
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    timeouts: dict[str, Any] = {"init_timeout": config.start_timeout_s, "finish_timeout": config.end_timeout_s}
    supported = {key: value for key, value in timeouts.items() if key in wandb.Settings.model_fields}
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
        settings=wandb.Settings(**supported),
    )
    logger._wandb_init.pop("anonymous")  # W&B warns about this removed setting
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
    """Folder name of this run's sweep (`--multirun`); None for a single run."""
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
    """A message about a missing API key; None if there is one."""
    host = os.environ.get("WANDB_BASE_URL", DEFAULT_HOST)
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _in_netrc(host):
        return None
    return f"there is no API key for {host} (use `wandb login` or WANDB_API_KEY)"


def _in_netrc(host: str) -> bool:
    paths = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for path in (Path(path).expanduser() for path in paths):
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(str(path)).authenticators(urlsplit(host).hostname or host):
                return True
    return False
