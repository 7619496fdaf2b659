"""A lock file that lets one process at a time run a block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

PATIENCE_S = 1.0
"""Time before `on_wait` is called."""


@contextmanager
def exclusive(path: Path, *, required: bool = True, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Run the block in one process at a time among those that use the lock file `path`.

    Its folder is created. With `required=False` the block runs without a lock if the folder cannot be written or its
    file system has no locks, which then would raise OSError or NotImplementedError. `on_wait` is called if another
    process holds the lock for longer than a moment.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=PATIENCE_S if on_wait else -1)
        except Timeout:
            if on_wait:
                on_wait()
            lock.acquire()
    except (OSError, NotImplementedError):
        if required:
            raise
    try:
        yield
    finally:
        lock.release()
