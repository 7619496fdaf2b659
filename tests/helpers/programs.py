"""Run one of the project's programs as a process of its own, which has its libraries from the start.

It is a copy of the process that `ranks.py` copies, too: a new Python would import for seconds what these programs need.
From there on all is real, from `sys.argv` to the exit status. Whatever is about the start of Python itself, or about
variables that are read during imports, needs `subprocess`.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import ranks  # noqa: F401  # says what is imported in the process that is copied

PROJECT = Path(__file__).resolve().parents[2]
TRAIN = str(PROJECT / "train.py")


@dataclass(frozen=True)
class Ended:
    """What `subprocess.run` would say of it."""

    returncode: int
    """Negative for a signal."""
    stdout: str
    stderr: str


def run_program(
    program: str, *words: str, cwd: Path, timeout: float = 240, variables: Mapping[str, str] | None = None
) -> Ended:
    """What came of `python PROGRAM WORDS`, or of `python -m PROGRAM WORDS` if its name does not end with `.py`.

    Raises:
        TimeoutError: It has not come to an end; it is killed.
    """
    with TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        process = start_program(program, *words, cwd=cwd, stdout=stdout, stderr=stderr, variables=variables)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{program} still works after {timeout:.0f} s: {stderr.read_text()[-2000:]}")
        return Ended(process.exitcode, stdout.read_text(), stderr.read_text())


def start_program(
    program: str, *words: str, cwd: Path, stdout: Path, stderr: Path, variables: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """The same, which has only begun, in a session of its own; what it writes is appended to the files."""
    environment = {**os.environ, **(variables or {})}
    arguments = (program, words, str(cwd), environment, str(stdout), str(stderr))
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=arguments)
    process.start()
    return process


def processes_of(first: int) -> list[int]:
    """What lives of the session of a process, itself included; needs /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal():
                state, *numbers = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                if int(numbers[2]) == first and state not in "ZX":
                    found.append(int(entry.name))
    return found


def _run(program: str, words: tuple[str, ...], cwd: str, environment: dict[str, str], stdout: str, stderr: str) -> None:
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # Python's own for the children, not how this one was started
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [program, *words]
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which this kind of process does not do by itself
