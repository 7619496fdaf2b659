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
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import ranks  # noqa: F401  # says what is imported in the process that is copied

PROJECT = Path(__file__).resolve().parents[1]
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
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        environment = {**os.environ, **(variables or {})}
        process = multiprocessing.get_context("forkserver").Process(
            target=_run, args=(program, list(words), str(cwd), environment, *map(str, files))
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{program} still works after {timeout:.0f} s: {files[1].read_text()[-2000:]}")
        return Ended(process.exitcode, *(file.read_text() for file in files))


def _run(program: str, words: list[str], cwd: str, environment: dict[str, str], stdout: str, stderr: str) -> None:
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
