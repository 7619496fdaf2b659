"""A simulated SLURM job: its signal, the requeue request, and the second start, with SLURM's variables.

There is no SLURM here. Two processes get what `srun` gives to its tasks, and `scontrol` is a program that writes down
what it was asked.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launches import HERE, end_all, start, train
from test_elastic import LONG, assert_same, undisturbed

__all__ = ["undisturbed"]

JOB = "4711"
HERE_IS_SLURM = {
    "SLURM_JOB_ID": JOB,
    "SLURM_JOB_NAME": "dino",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "1",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "127.0.0.1",
}


def srun(folder: Path, *, restarts: int) -> list[subprocess.Popen[bytes]]:
    """Start both tasks of the job; the run's folder is named after the job."""
    command = train(f"imports=[{HERE}/faulty_rank.py]", "collective_timeout_s=60", "data.num_workers=1", *LONG)
    variables = {**HERE_IS_SLURM, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "MARK": str(folder / "mark")}
    variables |= {"FAULT": "noted", "FAULTY": "0", "FAULT_STEP": "6"}
    variables |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    return [
        start(
            command, log=folder / f"log{restarts}{task}", SLURM_PROCID=str(task), SLURM_LOCALID=str(task), **variables
        )
        for task in (0, 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_at_its_time_limit_is_requeued(number: signal.Signals, undisturbed: Path, tmp_path: Path) -> None:
    """SIGTERM comes from `scancel`, or from a preemption after which SLURM itself restarts the job.

    As from SLURM, it reaches loader processes, too.
    """
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    program.chmod(0o755)
    tasks = srun(tmp_path, restarts=0)
    try:
        until = time.monotonic() + 180
        while not (tmp_path / "mark").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        for task in tasks:
            os.killpg(task.pid, number)
        assert tasks[0].wait(timeout=120) == 75, (tmp_path / "log00").read_text()
        assert tasks[1].wait(timeout=120) == 0, (tmp_path / "log01").read_text()
        asked = tmp_path / "asked"
        expected = f"requeue {JOB}\n" if number == signal.SIGUSR1 else ""
        assert (asked.read_text() if asked.exists() else "") == expected
        (run,) = (tmp_path / "outputs").iterdir()
        assert run.name.endswith(JOB)
        tasks = srun(tmp_path, restarts=1)
        assert [task.wait(timeout=240) for task in tasks] == [0, 0], (tmp_path / "log10").read_text()
        assert_same(run, undisturbed)
    finally:
        for task in tasks:
            end_all(task.pid)
