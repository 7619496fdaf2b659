"""Checkpoints of a run as files: written whole or not at all, verified when read, the last good one always kept.

A file is what `torch.save` writes and behind it a line with the SHA-256 of that, so that a file is judged by itself
wherever it was copied to; `torch.load` passes over the line. Files are read with `weights_only=True` alone: a pickle
that could run code is refused.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch.utils._pytree import tree_map_only

from dino_lightning.checkpoints.safe_read import read_pickle
from dino_lightning.errors import UserError
from dino_lightning.runtime.console import warn
from dino_lightning.runtime.files import atomic_file, sync_folder

FORMAT = 2
"""What a checkpoint holds. 1: Lightning's, without a format; random states and each rank's own states came with 2."""
LAST = "last.ckpt"
HASH_LINE = re.compile(rb"\nsha256:([0-9a-f]{64})\n")
HASH_LINE_START, HASH_LINE_BYTES = b"\nsha256:", 73
CHUNK_BYTES = 1 << 24
FORK_RESULT = ".temp.ckpt"
"""What Lightning calls the file in which a forked process gives its last weights to the one that forked it."""


class CorruptCheckpointError(Exception):
    """A file that is not what was written."""


class _HashingFile:
    """A file for `torch.save` that hashes what passes through and keeps the error of a write.

    PyTorch's writer turns every error into one of its own that says neither what nor why.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.hash.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint and its hash. Raises `OSError`, and then `path` is what it was."""
    with atomic_file(path) as file:
        hashing = _HashingFile(file)
        try:
            torch.save(content, hashing)  # pyright: ignore[reportArgumentType]  (it needs these two methods only)
        except Exception as error:
            if hashing.error is not None:
                raise hashing.error from error
            raise
        file.write(b"\nsha256:" + hashing.hash.hexdigest().encode() + b"\n")


def verify(path: Path) -> bool:
    """Whether the file carries a hash. Raises `DamagedError` where it is not the file's, `OSError` without a file."""
    size = path.stat().st_size
    if size == 0:
        raise CorruptCheckpointError("it is empty")
    with path.open("rb") as file:
        file.seek(max(0, size - HASH_LINE_BYTES))
        end = file.read()
        found = HASH_LINE.fullmatch(end)
        if found is None:
            if HASH_LINE_START in end:
                raise CorruptCheckpointError("its hash is cut off")
            return False
        file.seek(0)
        digest, left = hashlib.sha256(), size - HASH_LINE_BYTES
        while left and (chunk := file.read(min(CHUNK_BYTES, left))):
            digest.update(chunk)
            left -= len(chunk)
    if digest.hexdigest().encode() != found[1]:
        raise CorruptCheckpointError("its content does not belong to its hash")
    return True


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a whole checkpoint of a run, on the CPU.

    Raises `DamagedError` where it is damaged, and `UserError` where it is refused: besides data it holds code, or a
    later version of this package wrote it.
    """
    try:
        hashed = verify(path)
    except OSError as error:
        raise CorruptCheckpointError(error.strerror or str(error)) from error
    try:
        content = read_pickle(path, source=str(path))
    except UserError as error:
        if hashed or "is refused" in str(error):
            raise
        raise CorruptCheckpointError("it is cut off, or no checkpoint") from error
    if "state_dict" not in content or "loops" not in content:
        raise UserError(f"{path} is no checkpoint of a run: it has weights alone, and a run cannot go on from them.")
    if content.get("format", 1) > FORMAT:
        raise UserError(
            f"{path} was written by a later version of dino-lightning (format {content['format']}, "
            f"this one knows {FORMAT}); go on with that version."
        )
    return content


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints from which a run can go on: `last.ckpt`, those before it, then all others by their time."""
    latest = [folder / name for name in _rotation_names(LAST) if (folder / name).exists()]
    others = sorted(set(folder.glob("*.ckpt")) - set(latest), key=lambda path: path.stat().st_mtime, reverse=True)
    return latest + others


def latest_valid(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its content; None where there is no checkpoint.

    Says on stderr which ones were damaged and passed over. Raises `UserError` where all of them are.
    """
    damaged = []
    for path in list_checkpoints(folder):
        try:
            content = read_checkpoint(path)
        except CorruptCheckpointError as error:
            damaged.append(f"{path.name} is damaged ({error})")
            continue
        if damaged:
            warn(f"{'; '.join(damaged)}. Going on from {path}, at step {content['global_step']}.")
        return path, content
    if damaged:
        raise UserError(
            f"resume: no checkpoint in {folder} is whole: {'; '.join(damaged)}; start anew in another output_dir."
        )
    return None


def _rotation_names(name: str) -> Iterator[str]:
    """`last.ckpt`, `last-1.ckpt`, ... without end for who looks, and so bounded by what a folder can hold."""
    stem, suffix = os.path.splitext(name)
    yield name
    for number in range(1, 100):
        yield f"{stem}-{number}{suffix}"


class SafeCheckpointIO(CheckpointIO):
    """How Lightning writes and reads checkpoints here; on rank 0 alone it writes.

    A file that cannot be written (no space left, say) is told on stderr and does not end the run: the one before it is
    there, and the next one may succeed. `failure` has the error of the latest file, None where it was written.
    """

    def __init__(self, *, keep_last: int = 1) -> None:
        self.keep_last = keep_last
        self.names: list[str] = []
        """Further names under which the next file is kept; emptied by it."""
        self.failure: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a file; `last.ckpt` pushes those before it back."""
        if Path(path).name == FORK_RESULT:
            torch.save(checkpoint, path)
            return
        names, self.names = self.names, []
        self.write({**checkpoint, "format": FORMAT}, Path(path), names)

    def write(self, content: dict[str, Any], path: Path, names: list[str]) -> None:
        """Write it, and keep it under further names."""
        self.failure = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f".new-{path.name}")
            write_checkpoint(content, fresh)
            for name in names:
                self.copy(fresh, name)
            if path.name == LAST:
                self._rotate(path)
            os.replace(fresh, path)
            sync_folder(path.parent)
        except OSError as error:
            self.failure = error
            warn(
                f"{path} could not be written ({error.strerror or error}); the checkpoint before it is kept, and "
                "training goes on."
            )

    def _rotate(self, path: Path) -> None:
        """`last.ckpt` becomes `last-1.ckpt`, ..., and those above `keep_last` go."""
        names = [path.with_name(name) for name in _rotation_names(path.name)]
        for old in names[self.keep_last :]:
            if not old.exists():
                break
            old.unlink()
        for place in reversed(range(self.keep_last - 1)):
            if names[place].exists():
                os.replace(names[place], names[place + 1])

    def copy(self, file: Path, name: str) -> None:
        """Keep a file under a further name: as a link where the disk has them, since no file is written in place."""
        temporary = file.with_name(f".link-{name}")
        temporary.unlink(missing_ok=True)
        try:
            os.link(file, temporary)
        except OSError:
            shutil.copyfile(file, temporary)
        os.replace(temporary, file.with_name(name))

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        """Read a file that is whole; `weights_only` is always True here."""
        if Path(path).name == FORK_RESULT:
            return torch.load(path, map_location="cpu", weights_only=True)
        try:
            return read_checkpoint(Path(path))
        except CorruptCheckpointError as error:
            raise UserError(f"{path} is damaged: {error}.") from error

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a file."""
        Path(path).unlink(missing_ok=True)


class AsyncCheckpointIO(SafeCheckpointIO):
    """The same in a thread beside the training: it waits for the copy in memory, and for the file before."""

    def __init__(self, *, keep_last: int = 1) -> None:
        super().__init__(keep_last=keep_last)
        self._wait: Callable[[], None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Copy all tensors to the host's memory and start to write."""
        from threading import Thread

        self.wait()
        names, self.names = self.names, []
        content = tree_map_only(torch.Tensor, _copy_to_host, {**checkpoint, "format": FORMAT})
        # Not a daemon: a program that ends waits for its last checkpoint.
        thread = Thread(target=self.write, args=(content, Path(path), names), name="checkpoint")
        thread.start()
        self._wait = thread.join

    def wait(self) -> None:
        """Return when the file on its way is written."""
        if self._wait is not None:
            self._wait()
            self._wait = None

    def teardown(self) -> None:
        """Lightning calls it at the end."""
        self.wait()


def _copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)
