"""What a run writes down about itself, and how it writes.

Floor 0: needs the standard library and, for what GPU there is, PyTorch.
"""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

FAILED = "failed.txt"
"""In the folder of a run that failed: the reason in its first line, and the traceback of an unforeseen error."""

OVERRIDES = "overrides.yaml"
"""In the folder of a run of a sweep: the words `KEY=VALUE` of the command, with the values of this run."""


def environment() -> dict[str, Any]:
    """What the run was made with: versions, machine, commit, command line."""
    import torch  # not above: processes that only start runs do without

    packages = ("dino-lightning", "torch", "torchvision", "lightning", "timm", "hydra-core")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "gpu": gpu,
        "cpu_count": os.cpu_count(),
        **{name: version(name) for name in packages},
    }


@cache
def commit() -> str | None:
    """Commit of the checkout that the code runs from, with `+` where it was changed; None for an installed wheel.

    Asked at the start of a run and kept: by its end the checkout may have moved on.
    """
    folder = Path(__file__).parent
    try:
        git = ["git", "-C", str(folder), "--no-optional-locks"]
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=False)
        if tracked.returncode:
            return None
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.stdout.strip() else "")


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file open for writing that takes the place of `path` when the block ends, whole and on the disk.

    Until then, and for good where the block ends with an error, `path` is what it was. What a killed process leaves is
    `PATH.tmp`, and the next one writes over it.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last: a file that was renamed is found again after a loss of power."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems do not know it
        pass
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a text so that nobody ever sees half of it."""
    with atomic_file(path) as file:
        file.write(text.encode())
