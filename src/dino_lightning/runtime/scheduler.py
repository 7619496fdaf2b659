"""Restarts by SLURM, submitit and torchrun: how a run detects one, and how it asks for one."""

import os
import subprocess
import sys
import time
from pathlib import Path

from dino_lightning.errors import UserError

PREEMPTED = 75
"""Exit status of a run that was asked to stop (SIGTERM, SIGUSR1, SIGUSR2) and has saved: start it again."""
INTERRUPTED = 130
"""Exit status of a run that was stopped with Ctrl-C (SIGINT) and has saved."""

INTERACTIVE = ("bash", "interactive")
"""Names of interactive SLURM jobs, which have no script to start again."""


def starts_again() -> bool:
    """Whether this process may be a later start of the same run, with the same arguments.

    SLURM counts its starts; submitit does not. torchrun counts them separately on each host: on a host whose processes
    did not fail, or that replaces another, the second start of a run has the number 0. So torchrun's permission to
    restart is decisive, not its number.
    """
    counted = _number("SLURM_RESTART_COUNT") > 0 or _number("TORCHELASTIC_RESTART_COUNT") > 0
    return counted or _number("TORCHELASTIC_MAX_RESTARTS") > 0 or inside_submitit()


def inside_submitit() -> bool:
    """Whether submitit has started this process, and restarts it after its own signal."""
    return bool(os.environ.get("SUBMITIT_EXECUTOR"))


def first_start() -> float:
    """Start time of the run (seconds since 1970), the same in all processes that torchrun has started.

    Without `--rdzv-id`, the processes of one machine have only torchrun itself in common, so its start time is used.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return time.time()
    if _number("GROUP_WORLD_SIZE") > 1:
        raise UserError(
            "output_dir has no value that is the same on all machines: set torchrun's --rdzv-id=NAME, or set "
            "output_dir=FOLDER."
        )
    try:
        ticks = int(Path(f"/proc/{os.getppid()}/stat").read_text().rsplit(")", 1)[1].split()[19])
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    except OSError:
        raise UserError("output_dir: set torchrun's --rdzv-id=NAME, or set output_dir=FOLDER.") from None
    return int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")


def requeue_slurm_job() -> bool:
    """Ask SLURM to requeue this job, and return whether it will. Call it in one process, after everything is written.

    Use it for the signal that the job has requested (`#SBATCH --signal=USR1@300`), not for SIGTERM: `scancel` sends
    that, and after a preemption SLURM requeues without being asked. In submitit, submitit's own handler does it.
    """
    job = slurm_job()
    if job is None or inside_submitit():
        return False
    command = ["scontrol", "requeue", job]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        failure = asked.stderr.strip() or f"exit status {asked.returncode}" if asked.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    if failure:
        print(
            f"dino-lightning: `{' '.join(command)}` has failed ({failure}): submit the job again; with resume=true "
            "it continues from checkpoints/last.ckpt.",
            file=sys.stderr,
        )
    return not failure


def slurm_job() -> str | None:
    """Id of this job for `scontrol`, such as `123`, or `120_4` in an array; None outside SLURM's batch jobs."""
    if os.environ.get("SLURM_JOB_NAME") in INTERACTIVE:
        return None
    if os.environ.get("SLURM_ARRAY_JOB_ID") and os.environ.get("SLURM_ARRAY_TASK_ID"):
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID") or None


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0
