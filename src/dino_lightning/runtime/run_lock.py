"""One run at a time in a folder: a lock that the running process holds and that ends with it, however it ends.

The lock is one of a process (`fcntl.lockf`), not of an open file (`flock`): loader processes, which may live a few
seconds longer than the process that was killed, do not inherit it, so that the next run can begin at once.
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
"""File in the folder of a run that goes on: host and number of its process."""
PATIENCE_S = 1.0
"""Seconds for a run that is about to end, such as one that was told to leave just now."""


@contextmanager
def run_lock(folder: str | Path) -> Iterator[None]:
    """Make the folder of a run and keep other runs out of it; a folder that is empty afterwards goes again.

    Raises `UserError` where another run is in it and where it cannot be written. The processes of the other devices
    do nothing here.
    """
    if not is_first_process():
        yield
        return
    path = Path(folder).expanduser().absolute()
    try:
        made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        lock = _opened(path / LOCK)
    except OSError as error:
        raise cannot_be_written("output_dir", folder, error) from error
    try:
        yield
    finally:
        # The file goes first: whoever has opened it meanwhile sees that it is another one, and opens anew.
        with suppress(OSError):
            os.unlink(path / LOCK)
        lock.close()
        if made:
            with suppress(OSError):
                path.rmdir()


def _opened(path: Path) -> IO[str]:
    """The lock file, held by this process."""
    until = time.monotonic() + PATIENCE_S
    while True:
        file = path.open("a+")
        try:
            if not _lock(file):
                if time.monotonic() > until:
                    file.seek(0)
                    owner = file.read().strip() or "another process"
                    raise UserError(
                        f"output_dir={path.parent} is in use by a run that has not ended ({owner}); wait "
                        "for its end, or choose another folder."
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
    """Whether this process has the lock now; yes where the system or the disk knows none."""
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
