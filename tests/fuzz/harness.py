"""Shared parts of the fuzzers: seeds on disk, a guard against side effects, and findings that do not end the run.

A *finding* is an input with another result than success or an expected error: another exception, a message with several
lines, code that is executed, a file that is written, a long run time, or much memory. Each kind of finding is saved
once; exceptions are distinguished by where they were raised. A crash of native code ends the process, and libFuzzer
saves the input.
"""

import builtins
import hashlib
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

TIME_LIMIT_S = 10.0
"""Limit of the processor time for one input."""
MEMORY_LIMIT_MB = 400
"""Limit of the growth of the peak memory by one input."""
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "pty.spawn",
    "subprocess.Popen",
    "socket.connect",
    "socket.getaddrinfo",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
    "shutil.move",
    "shutil.copyfile",
)
"""Audit events that reading a file must not cause."""


class Forbidden(BaseException):
    """A side effect of the code under test. Not an `Exception`, so that no handler treats it as a broken file."""


class Guard:
    """A context manager that refuses side effects; files below `allowed` may be written."""

    def __init__(self, allowed: Path | None = None):
        self.allowed = None if allowed is None else str(allowed)
        self.active = False
        self.side_effects: list[str] = []
        sys.addaudithook(self._audit)
        for name in ("exec", "eval"):
            setattr(builtins, name, self._guarded(name, getattr(builtins, name)))

    def __enter__(self) -> None:
        self.side_effects.clear()
        self.active = True

    def __exit__(self, *_: object) -> None:
        self.active = False

    def _refuse(self, what: str) -> NoReturn:
        self.side_effects.append(what)
        raise Forbidden(what)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and not self._is_allowed(path):
                self._refuse(f"open({path!r}, flags={flags})")
        elif event in FORBIDDEN and not self._is_allowed(_path_in(arguments)):
            self._refuse(f"{event}{arguments!r}"[:200])

    def _is_allowed(self, path: object) -> bool:
        return self.allowed is not None and isinstance(path, str | Path) and str(path).startswith(self.allowed)

    def _guarded(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **options: Any) -> Any:
            # Imports execute code; dataclasses and namedtuple create methods with `exec`.
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if self.active and not caller.startswith(("importlib", "_frozen_importlib", "dataclasses", "collections")):
                self._refuse(f"{name} in {caller}")
            return original(*arguments, **options)

        return guarded


class Findings:
    """Runs inputs and saves those with a finding."""

    def __init__(self, folder: Path, guard: Guard):
        self.folder, self.guard = folder, guard
        folder.mkdir(parents=True, exist_ok=True)
        self.known: set[str] = set()
        self.executions = 0

    def run(self, data: bytes, target: Callable[[bytes], None], expected: tuple[type[BaseException], ...]) -> None:
        """Run `target`, which may only raise `expected` errors with a message of one line."""
        self.executions += 1
        memory, started = _megabytes(), time.process_time()
        try:
            with self.guard:
                target(data)
        except expected as error:
            if "\n" in str(error):
                self.keep(data, f"several lines: {type(error).__name__}", error)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self.keep(data, f"{type(error).__name__} at {_location(error)}", error)
        if self.guard.side_effects:
            self.keep(data, f"side effect {self.guard.side_effects[0].split('(')[0]}", None)
        if (took := time.process_time() - started) > TIME_LIMIT_S:
            self.keep(data, f"slow: {took:.0f} s", None, kind=f"slow {data[:1]!r}")
        if (grown := _megabytes() - memory) > MEMORY_LIMIT_MB:
            self.keep(data, f"memory: {grown:.0f} MB", None, kind=f"memory {data[:1]!r}")

    def keep(self, data: bytes, what: str, error: BaseException | None, kind: str | None = None) -> None:
        """Save the input and its traceback, once for each kind."""
        if (kind or what) in self.known:
            return
        self.known.add(kind or what)
        name = hashlib.sha256((kind or what).encode()).hexdigest()[:12]
        (self.folder / f"{name}.bin").write_bytes(data)
        text = what + "\n" + ("".join(traceback.format_exception(error)) if error else "")
        (self.folder / f"{name}.txt").write_text(text)
        print(f"FINDING {what}: {self.folder / name}.bin", file=sys.stderr, flush=True)


def _path_in(arguments: tuple[Any, ...]) -> object:
    """The path of an audit event; if it is relative to an open folder, that folder."""
    if len(arguments) > 1 and isinstance(arguments[-1], int) and arguments[-1] >= 0 and os.name == "posix":
        return os.path.realpath(f"/proc/self/fd/{arguments[-1]}")
    return arguments[0] if arguments else None


def _location(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"


def _megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def folder(name: str) -> Path:
    """The folder for corpus and findings of a fuzzer, in `$DINO_FUZZ` or the folder for temporary files."""
    return Path(os.environ.get("DINO_FUZZ", Path(tempfile.gettempdir()) / "dino-fuzz")) / name


def scratch(name: str) -> Path:
    """A folder for the files under test, in memory if possible."""
    parent = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    path = parent / f"dino-fuzz-{name}-{os.getpid()}"
    path.mkdir(parents=True, exist_ok=True)
    return path


def fuzz(name: str, seeds: Iterable[bytes], target: Callable[[bytes], None]) -> None:
    """Write the seeds and run libFuzzer with the options of the command line."""
    import atheris

    corpus = folder(name) / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    options = [*sys.argv, str(corpus), f"-artifact_prefix={folder(name)}/"]
    if not any(option.startswith("-timeout") for option in options):
        options.append("-timeout=60")
    atheris.Setup(options, target)
    atheris.Fuzz()
