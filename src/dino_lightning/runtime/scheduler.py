"""Runs that a scheduler or launcher starts again: how a run knows, and how it asks for it.

Floor 0: needs the environment variables of SLURM, submitit and torchrun alone.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from dino_lightning.errors import UserError

PREEMPTED = 75
"""Exit status of a run that was told to end (SIGTERM, SIGUSR1, SIGUSR2) and has saved: start it again."""
INTERRUPTED = 130
"""Exit status of a run that was told to end by Ctrl-C (SIGINT) and has saved."""

INTERACTIVE = ("bash", "interactive")
"""Names of SLURM jobs in which a person types: there is no script to start again."""


def starts_again() -> bool:
    """Whether this process may be a later start of the same run, with the same arguments.

    SLURM counts its starts. submitit does not. torchrun does so for each host by itself: on a host whose processes were
    fine, or that came in place of another, the second start of a run has the number 0. That is why torchrun's leave to
    restart counts, not its number.
    """
    counted = _number("SLURM_RESTART_COUNT") > 0 or _number("TORCHELASTIC_RESTART_COUNT") > 0
    return counted or _number("TORCHELASTIC_MAX_RESTARTS") > 0 or inside_submitit()


def inside_submitit() -> bool:
    """Whether submitit has started this process, and starts it again after its own signal."""
    return bool(os.environ.get("SUBMITIT_EXECUTOR"))


def first_start() -> float:
    """When the run was started, in seconds since 1970, alike in all processes that torchrun has started.

    With `--rdzv-id` they have a name in common; without, on one machine, torchrun itself, which outlives them.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return time.time()
    if _number("GROUP_WORLD_SIZE") > 1:
        raise UserError(
            "output_dir has no value that all machines share: give torchrun a name, --rdzv-id=NAME, or set "
            "output_dir=FOLDER."
        )
    try:
        ticks = int(Path(f"/proc/{os.getppid()}/stat").read_text().rsplit(")", 1)[1].split()[19])
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    except OSError:
        raise UserError("output_dir: give torchrun a name, --rdzv-id=NAME, or set output_dir=FOLDER.") from None
    return int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")


def requeue_slurm_job() -> bool:
    """Ask SLURM to start this job again; whether it will. For one process of the job, when all is written.

    Not for SIGTERM: `scancel` sends that, and a preemption after which SLURM requeues by itself. For the signal that
    the job has asked for (`#SBATCH --signal=USR1@300`). Within submitit, submitit's own handler does it.
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
            f"dino-lightning: `{' '.join(command)}` has failed ({failure}): submit the job again; it goes on from "
            "checkpoints/last.ckpt with resume=true.",
            file=sys.stderr,
        )
    return not failure


def slurm_job() -> str | None:
    """What `scontrol` calls this job, `123` or `120_4` for one of an array; None outside SLURM's batch jobs."""
    if os.environ.get("SLURM_JOB_NAME") in INTERACTIVE:
        return None
    if os.environ.get("SLURM_ARRAY_JOB_ID") and os.environ.get("SLURM_ARRAY_TASK_ID"):
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID") or None


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0
