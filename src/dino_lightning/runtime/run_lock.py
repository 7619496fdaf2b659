"""A lock that allows one run at a time in a folder. It ends with its process, also if that is killed.

The lock belongs to a process (`fcntl.lockf`), not to an open file (`flock`). Loader processes may live a few seconds
longer than a killed process; they do not inherit the lock, so that the next run can start immediately.
"""

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from dino_lightning.errors import UserError, cannot_be_written
from dino_lightning.runtime.ranks import is_first_process

LOCK = ".running"
"""File in the folder of an active run, with its process number and host."""
PATIENCE_S = 1.0
"""Time to wait for a run that is about to end, such as one that was just asked to stop."""


@contextmanager
def run_lock(folder: str | Path) -> Iterator[None]:
    """Create and lock the output folder; remove it at the end if it is still empty.

    Raises `UserError` if another run uses the folder or if it cannot be written. Only the first process does this.
    """
    if not is_first_process():
        yield
        return
    path = Path(folder).expanduser().absolute()
    try:
        is_new = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        lock = _open_lock(path / LOCK)
    except OSError as error:
        raise cannot_be_written("output_dir", folder, error) from error
    try:
        yield
    finally:
        # The file is deleted before it is unlocked: a process that has opened it then notices, and opens a new one.
        with suppress(OSError):
            os.unlink(path / LOCK)
        lock.close()
        if is_new:
            with suppress(OSError):
                path.rmdir()


def _open_lock(path: Path) -> IO[str]:
    """The lock file, open and locked by this process."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        file = path.open("a+")
        try:
            if not _lock(file):
                if time.monotonic() > deadline:
                    file.seek(0)
                    owner = file.read().strip() or "another process"
                    raise UserError(
                        f"output_dir={path.parent} is in use by an active run ({owner}); wait until it "
                        "ends, or choose another folder."
                    )
                file.close()
                time.sleep(0.1)
                continue
            if not os.path.exists(path) or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.close()  # of a run that has just ended
                continue
        except BaseException:
            file.close()
            raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return file


def _lock(file: IO[str]) -> bool:
    """Whether this process has the lock now; True if the system or the disk does not support locks."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows both for a lock that is taken
        return False
    except OSError:
        return True
    return True
