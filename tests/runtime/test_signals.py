"""Signals to a process that does not train yet, or no longer."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PREEMPTED = 75
LISTENS = "import os, signal\nfrom dino_lightning.runtime import signals\nsignals.install_early_handlers()\n"


def ended(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    known = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "DINO_L"))}
    command = [sys.executable, "-c", LISTENS + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={**known, **variables})


def sends(name: str) -> str:
    return f"os.kill(os.getpid(), signal.{name})\nprint('goes on')\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_it_leaves_at_once_with_the_status_for_another_start(name: str) -> None:
    done = ended(sends(name))
    assert (done.returncode, done.stdout) == (PREEMPTED, "")
    assert f"{name} outside of training: nothing to save, exiting immediately with status 75" in done.stderr


@pytest.mark.parametrize(
    ("name", "process", "asked"),
    [
        ("SIGUSR1", "0", ["requeue 17"]),
        ("SIGUSR1", "1", []),
        ("SIGTERM", "0", []),
    ],
)
def test_slurm_is_asked_once_for_its_own_signal(name: str, process: str, asked: list[str], tmp_path: Path) -> None:
    script, notes = tmp_path / "scontrol", tmp_path / "notes.txt"
    notes.touch()
    script.write_text(f'#!/bin/sh\necho "$@" >> {notes}\n')
    script.chmod(0o755)
    done = ended(sends(name), SLURM_JOB_ID="17", SLURM_PROCID=process, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == PREEMPTED
    assert notes.read_text().splitlines() == asked


def test_who_listens_already_goes_on_to() -> None:
    code = "signal.signal(signal.SIGUSR1, lambda *_: print('heard'))\nsignals.install_early_handlers()\n"
    assert ended(code + sends("SIGUSR1")).stdout == "heard\ngoes on\n"


def test_when_all_is_written_it_goes_on_to_its_end() -> None:
    done = ended("signals.ignore_at_shutdown()\n" + sends("SIGTERM") + sends("SIGUSR1"))
    assert (done.returncode, done.stdout) == (0, "goes on\n" * 2)


def test_a_process_that_the_first_one_has_started_is_lost_to_it() -> None:
    assert ended(sends("SIGTERM"), DINO_LIGHTNING_STARTED_BY="1").returncode == -signal.SIGTERM


def test_a_forked_process_ends_as_any_other() -> None:
    code = "child = os.fork()\nif not child:\n    os.kill(os.getpid(), signal.SIGTERM)\n    os._exit(3)\n"
    code += "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    done = ended(code)
    assert (done.stdout, done.stderr) == (f"{-signal.SIGTERM}\n", "")
