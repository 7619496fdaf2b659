"""Run a program of the project in a separate process that starts faster than a new Python.

The process comes from the fork server (`fork_server.py`), which has imported the libraries already; a new Python
needs seconds for the imports. Everything else is real, from `sys.argv` to the exit status. Tests of the start of
Python, or of environment variables that are read during imports, need `subprocess` instead.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory

from fork_server import forget_cleanups, redirect_library_logs

PROJECT = Path(__file__).resolve().parents[2]
TRAIN = str(PROJECT / "train.py")


@dataclass(frozen=True)
class Completed:
    """Like `subprocess.CompletedProcess`."""

    returncode: int
    """Negative if a signal ended the process."""
    stdout: str
    stderr: str


def run_program(
    program: str, *arguments: str, cwd: Path, timeout: float = 240, variables: Mapping[str, str] | None = None
) -> Completed:
    """Run `python PROGRAM ARGUMENTS`, or `python -m PROGRAM ARGUMENTS` if the name does not end with `.py`.

    Raises:
        TimeoutError: The program did not end in time and was killed.
    """
    with TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        process = start_program(program, *arguments, cwd=cwd, stdout=stdout, stderr=stderr, variables=variables)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{program} still runs after {timeout:.0f} s: {stderr.read_text()[-2000:]}")
        return Completed(process.exitcode, stdout.read_text(), stderr.read_text())


def run_code(
    code: str, *arguments: str, cwd: Path, timeout: float = 240, variables: Mapping[str, str] | None = None
) -> Completed:
    """Like `run_program`, for the text of a program."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "code.py")
        file.write_text(code)
        return run_program(str(file), *arguments, cwd=cwd, timeout=timeout, variables=variables)


def start_program(
    program: str, *arguments: str, cwd: Path, stdout: Path, stderr: Path, variables: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """Start a program in a new session without waiting for it; its output is appended to the files."""
    environment = {**os.environ, **(variables or {})}
    call = (program, arguments, str(cwd), environment, str(stdout), str(stderr))
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=call)
    process.start()
    return process


def processes_of(first: int) -> list[int]:
    """Living processes of the session that the process `first` leads; needs /proc."""
    pids = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal():
                state, *numbers = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                if int(numbers[2]) == first and state not in "ZX":
                    pids.append(int(entry.name))
    return pids


def _run(
    program: str, arguments: tuple[str, ...], cwd: str, environment: dict[str, str], stdout: str, stderr: str
) -> None:
    os.setsid()
    forget_cleanups()
    multiprocessing.set_start_method(None, force=True)  # child processes use Python's default
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    redirect_library_logs(sys.stderr)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [program, *arguments]
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except Exception as error:  # like Python; multiprocessing would print the traceback itself
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
    finally:
        # As at the end of Python. multiprocessing calls no exit functions, and would wait for joblib's processes, which
        # end in the first step.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
