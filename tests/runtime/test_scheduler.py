"""Schedulers are recognized by environment variables; a fake `scontrol` records how SLURM is asked to requeue a job."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from programs import run_code

from dino_lightning.runtime.scheduler import requeue_slurm_job, slurm_job
from dino_lightning.training.resume import resume_mode

VARIABLES = (
    "SLURM_RESTART_COUNT",
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_RUN_ID",
    "GROUP_WORLD_SIZE",
    "DINO_LIGHTNING_RUN",
    "SUBMITIT_EXECUTOR",
)


@dataclass
class Config:
    resume: object = False


@pytest.fixture(autouse=True)
def _no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_RESTART_COUNT": "1", "SLURM_JOB_ID": "7"},
        {"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_MAX_RESTARTS": "3"},
        # A host whose own processes did not fail counts from 0.
        {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "3"},
        {"SUBMITIT_EXECUTOR": "local"},
    ],
)
def test_a_restarted_run_resumes(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert resume_mode(Config(False)) == "auto"  # type: ignore[arg-type]
    assert resume_mode(Config(True)) is True  # type: ignore[arg-type]
    assert resume_mode(Config("auto")) == "auto"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "7"},
        {"SLURM_RESTART_COUNT": "0", "SLURM_JOB_ID": "7"},
        {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"},
    ],
)
def test_the_first_start_does_not_resume(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert resume_mode(Config(False)) is False  # type: ignore[arg-type]


def fake_scontrol(folder: Path, *, status: int = 0) -> Path:
    """The folder of a `scontrol` that writes its arguments to a file."""
    program = folder / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\necho "no such job" >&2\nexit {status}\n')
    program.chmod(0o755)
    return program.parent


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ({"SLURM_JOB_ID": "123"}, "requeue 123\n"),
        ({"SLURM_JOB_ID": "125", "SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "4"}, "requeue 120_4\n"),
        ({"SLURM_JOB_ID": "123", "SLURM_JOB_NAME": "interactive"}, None),
        ({"SLURM_JOB_ID": "123", "SUBMITIT_EXECUTOR": "slurm"}, None),
        ({}, None),
    ],
)
def test_slurm_requeues_the_job(
    variables: dict[str, str], asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{fake_scontrol(tmp_path)}:{os.environ['PATH']}")
    assert requeue_slurm_job() == (asked is not None)
    written = tmp_path / "asked"
    assert (written.read_text() if written.exists() else None) == asked


def test_a_failed_requeue_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("PATH", f"{fake_scontrol(tmp_path, status=1)}:{os.environ['PATH']}")
    assert not requeue_slurm_job()
    assert "`scontrol requeue 123` has failed (no such job): submit the job again" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert not requeue_slurm_job()
    assert "scontrol" in capsys.readouterr().err


def test_an_interactive_session_is_no_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    assert slurm_job() == "9"
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert slurm_job() is None


NAMES = """
import os, sys, time
from dino_lightning.cli.program import run_name
for pause in (0, float(sys.argv[1])):
    time.sleep(pause)
    if not os.fork():
        print(run_name())
        sys.exit()
    os.wait()
"""


def names(folder: Path, *, pause: float = 0, **variables: str) -> list[str]:
    """The run names in two processes that the same parent starts `pause` seconds apart."""
    done = run_code(NAMES, str(pause), cwd=folder, variables=variables)
    return done.stdout.split() or [done.stderr]


def test_a_restarted_run_keeps_its_folder(tmp_path: Path) -> None:
    assert names(tmp_path, SLURM_JOB_ID="42", SLURM_RESTART_COUNT="1") == ["42", "42"]
    assert names(tmp_path, TORCHELASTIC_RUN_ID="mine", TORCHELASTIC_RESTART_COUNT="1") == ["mine", "mine"]


def test_all_processes_and_restarts_of_torchrun_without_an_id_use_the_same_name(tmp_path: Path) -> None:
    """The name is the start time of torchrun's agent, which is the parent of all."""
    first, *others = names(tmp_path, pause=1.1, TORCHELASTIC_RUN_ID="none", GROUP_WORLD_SIZE="1")
    assert len(others) == 1
    assert set(others) == {first}
    assert first.startswith("20")
    (refused,) = names(tmp_path, TORCHELASTIC_RUN_ID="none", GROUP_WORLD_SIZE="2")
    assert "--rdzv-id" in refused
