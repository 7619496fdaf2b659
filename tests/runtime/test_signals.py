"""Signals to a process before and after its training."""

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


def send(name: str) -> str:
    return f"os.kill(os.getpid(), signal.{name})\nprint('continues')\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_the_process_exits_at_once_and_asks_to_be_restarted(name: str) -> None:
    done = ended(send(name))
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
def test_only_rank_0_asks_slurm_to_requeue(name: str, process: str, asked: list[str], tmp_path: Path) -> None:
    script, notes = tmp_path / "scontrol", tmp_path / "notes.txt"
    notes.touch()
    script.write_text(f'#!/bin/sh\necho "$@" >> {notes}\n')
    script.chmod(0o755)
    done = ended(send(name), SLURM_JOB_ID="17", SLURM_PROCID=process, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == PREEMPTED
    assert notes.read_text().splitlines() == asked


def test_earlier_handlers_stay() -> None:
    code = "signal.signal(signal.SIGUSR1, lambda *_: print('handled'))\nsignals.install_early_handlers()\n"
    assert ended(code + send("SIGUSR1")).stdout == "handled\ncontinues\n"


def test_signals_during_shutdown_are_ignored() -> None:
    done = ended("signals.ignore_at_shutdown()\n" + send("SIGTERM") + send("SIGUSR1"))
    assert (done.returncode, done.stdout) == (0, "continues\n" * 2)


def test_a_started_process_dies_of_the_signal() -> None:
    assert ended(send("SIGTERM"), DINO_LIGHTNING_STARTED_BY="1").returncode == -signal.SIGTERM


def test_a_forked_process_has_default_handlers() -> None:
    code = "child = os.fork()\nif not child:\n    os.kill(os.getpid(), signal.SIGTERM)\n    os._exit(3)\n"
    code += "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    done = ended(code)
    assert (done.stdout, done.stderr) == (f"{-signal.SIGTERM}\n", "")
