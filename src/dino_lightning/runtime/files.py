"""What a run writes down about itself, and how it writes.

Floor 0: needs the standard library and, for what GPU there is, PyTorch.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dino_lightning.errors import cannot_be_written

FAILED = "failed.txt"
"""In the folder of a run that failed: the reason in its first line, and the traceback of an unforeseen error."""

OVERRIDES = "overrides.yaml"
"""In the folder of a run of a sweep: the words `KEY=VALUE` of the command, with the values of this run."""


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


def check_writable(key: str, folder: Path) -> None:
    """Refuse a folder, the value of `key`, that cannot be made or in which no file can be written."""
    path = folder.expanduser().absolute()
    missing = [parent for parent in (path, *path.parents) if not _exists(parent)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"?")
    except OSError as error:
        raise cannot_be_written(key, folder, error) from error
    finally:
        for made in missing:
            try:
                made.rmdir()
            except OSError:
                break


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False
