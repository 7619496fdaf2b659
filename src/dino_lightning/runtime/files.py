"""Files of the package, and files and folders that are written completely or not at all."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dino_lightning.errors import cannot_be_written

PACKAGE = Path(__file__).parents[1]
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parents[1] / "conf"
"""Folder of the YAML files: inside an installed wheel, next to `src/` in a checkout."""

FAILED = "failed.txt"
"""File in the folder of a failed run: its first line is the reason; the traceback of an unforeseen error follows."""

OVERRIDES = "overrides.yaml"
"""File in the folder of a sweep's run: the `KEY=VALUE` overrides of the command, with the values of this run."""


def yaml_names(folder: Path, *, also: Iterable[str] = ()) -> list[str]:
    """The names of the YAML files in a folder, and of `also`.

    Files in a subfolder are FOLDER/NAME, at the end of the list. A subfolder with the name of a file, such as
    `preset/quick/`, contains parts of that option, which are left out.
    """
    paths = [path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml")]
    names = {path.as_posix() for path in paths if path.parent not in paths} | set(also)
    return sorted(names, key=lambda name: (name.count("/"), name))


@contextmanager
def atomic_file(path: Path, *, unique: bool = False) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` when the block ends, complete and synced to disk.

    If the block raises, `path` keeps its content. A killed process leaves `PATH.tmp`, which the next one overwrites.
    With `unique`, several processes may write the same file at the same time; a killed one leaves `PATH.<hex>.tmp`.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp" if unique else f"{path.name}.tmp")
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


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Create a hidden folder next to `path` that is renamed to `path` when the block ends, and deleted if it raises.

    `path` must not exist by then, or be an empty folder; otherwise OSError is raised. A killed process leaves the
    hidden folder, whose name `.NAME.<hex>.part` is never used again.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk, so that a renamed file keeps its name after a power loss."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems do not support it
        pass
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    with atomic_file(path) as file:
        file.write(text.encode())


def check_writable(key: str, folder: Path) -> None:
    """Raise `UserError` if no file can be written to `folder`, the value of `key`. Nothing new remains on the disk."""
    path = folder.expanduser().absolute()
    missing = [parent for parent in (path, *path.parents) if not _exists(parent)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"?")
    except OSError as error:
        raise cannot_be_written(key, folder, error) from error
    finally:
        for created in missing:
            try:
                created.rmdir()
            except OSError:
                break


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False
