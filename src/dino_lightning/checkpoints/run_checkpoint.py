"""Checkpoint files of a run: written atomically, verified when read, and the previous ones kept.

A file is the output of `torch.save` followed by one line with its SHA-256, so that a copy can be verified by itself;
`torch.load` ignores that line. Files are read with `weights_only=True`: a pickle that could run code is refused.
"""

import hashlib
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
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
"""Version of the checkpoint's content. 1 is Lightning's; 2 adds random states and the state of each rank."""
LAST = "last.ckpt"
ROTATION = [LAST, *(f"last-{number}.ckpt" for number in range(1, 100))]
"""Names of the latest checkpoints, the newest first."""
HASH_LINE = re.compile(rb"\nsha256:([0-9a-f]{64})\n")
HASH_LINE_START, HASH_LINE_BYTES = b"\nsha256:", 73
CHUNK_BYTES = 1 << 24
FORK_RESULT = ".temp.ckpt"
"""Lightning's name for the file in which a forked process returns its weights to its parent."""


class CorruptCheckpointError(Exception):
    """The file is not what was written."""


class _HashingFile:
    """A file for `torch.save` that hashes the data and remembers the error of a failed write.

    PyTorch's writer replaces every `OSError` by an error that does not say what failed.
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
    """Write a checkpoint and its hash. Raises `OSError` and leaves `path` unchanged if that fails."""
    with atomic_file(path) as file:
        hashing = _HashingFile(file)
        try:
            torch.save(content, hashing)  # pyright: ignore[reportArgumentType]  (it needs only these two methods)
        except Exception as error:
            if hashing.error is not None:
                raise hashing.error from error
            raise
        file.write(b"\nsha256:" + hashing.hash.hexdigest().encode() + b"\n")


def verify(path: Path) -> bool:
    """Whether the file has a hash. Raises `CorruptCheckpointError` if it does not match the content."""
    size = path.stat().st_size
    if size == 0:
        raise CorruptCheckpointError("it is empty")
    with path.open("rb") as file:
        file.seek(max(0, size - HASH_LINE_BYTES))
        end = file.read()
        expected = HASH_LINE.fullmatch(end)
        if expected is None:
            if HASH_LINE_START in end:
                raise CorruptCheckpointError("its hash is truncated")
            return False
        file.seek(0)
        digest, remaining = hashlib.sha256(), size - HASH_LINE_BYTES
        while remaining and (chunk := file.read(min(CHUNK_BYTES, remaining))):
            digest.update(chunk)
            remaining -= len(chunk)
    if digest.hexdigest().encode() != expected[1]:
        raise CorruptCheckpointError("its content does not match its hash")
    return True


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a run's checkpoint, on the CPU.

    Raises `CorruptCheckpointError` for a damaged file, and `UserError` for a file that contains code or was written by
    a later version of this package.
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
        raise CorruptCheckpointError("it is truncated or not a checkpoint") from error
    if "state_dict" not in content or "loops" not in content:
        raise UserError(
            f"{path} is not a checkpoint of a run: it contains only weights, and a run cannot resume from them."
        )
    if content.get("format", 1) > FORMAT:
        raise UserError(
            f"{path} was written by a later version of dino-lightning (format {content['format']}, this version reads "
            f"{FORMAT}); resume with that version."
        )
    return content


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that a run can resume from: `last.ckpt`, `last-1.ckpt`, ..., then all others, newest first."""
    latest = [folder / name for name in ROTATION if (folder / name).exists()]
    others = sorted(set(folder.glob("*.ckpt")) - set(latest), key=lambda path: path.stat().st_mtime, reverse=True)
    return latest + others


def latest_valid(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest valid checkpoint and its content; None if there is no checkpoint.

    Warns about damaged checkpoints that were skipped. Raises `UserError` if all are damaged.
    """
    damaged = []
    for path in list_checkpoints(folder):
        try:
            content = read_checkpoint(path)
        except CorruptCheckpointError as error:
            damaged.append(f"{path.name} is damaged ({error})")
            continue
        if damaged:
            warn(f"{'; '.join(damaged)}. Resuming from {path}, at step {content['global_step']}.")
        return path, content
    if damaged:
        raise UserError(
            f"resume: no checkpoint in {folder} is valid: {'; '.join(damaged)}; start a new run in another output_dir."
        )
    return None


class SafeCheckpointIO(CheckpointIO):
    """Writes and reads checkpoints for Lightning, which calls it on rank 0 only.

    If a file cannot be written, for example because the disk is full, it warns and the run continues: the previous
    checkpoint still exists, and the next one may succeed. `failure` is the error of the latest file, or None.
    """

    def __init__(self, *, keep_last: int = 1) -> None:
        self.keep_last = keep_last
        self.names: list[str] = []
        """Additional names for the next file, which empties the list."""
        self.failure: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a file; `last.ckpt` renames the previous ones."""
        names, self.names = self.names, []
        self.write(checkpoint, Path(path), names)

    def write(self, checkpoint: dict[str, Any], path: Path, names: list[str]) -> None:
        """Write the file and link it under the additional names."""
        if path.name == FORK_RESULT:
            torch.save(checkpoint, path)
            return
        self.failure = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f".new-{path.name}")
            write_checkpoint({**checkpoint, "format": FORMAT}, new)
            for name in names:
                self.copy(new, name)
            if path.name == LAST:
                self._rotate(path)
            os.replace(new, path)
            sync_folder(path.parent)
        except OSError as error:
            self.failure = error
            warn(
                f"{path} could not be written ({error.strerror or error}); the previous checkpoint is kept and "
                "training continues."
            )

    def _rotate(self, path: Path) -> None:
        """Rename `last.ckpt` to `last-1.ckpt`, and so on, and delete those beyond `keep_last`."""
        paths = [path.with_name(name) for name in ROTATION]
        for old in paths[self.keep_last :]:
            if not old.exists():
                break
            old.unlink()
        for index in reversed(range(self.keep_last - 1)):
            if paths[index].exists():
                os.replace(paths[index], paths[index + 1])

    def copy(self, file: Path, name: str) -> None:
        """Keep a file under another name: as a hard link if possible, since files are never changed in place."""
        temporary = file.with_name(f".link-{name}")
        temporary.unlink(missing_ok=True)
        try:
            os.link(file, temporary)
        except OSError:
            shutil.copyfile(file, temporary)
        os.replace(temporary, file.with_name(name))

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        """Read a valid file, always with `weights_only=True`."""
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
    """Writes in a background thread; training waits only for the copy to host memory and for the previous file.

    Lightning's `AsyncCheckpointIO` would clone all tensors on the GPU and queue any number of files. Here GPU memory
    does not grow, and host memory holds one checkpoint at most.
    """

    _pending: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Copy all tensors to host memory and start writing."""
        self.wait()
        names, self.names = self.names, []
        content = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), checkpoint)
        # The interpreter waits for this thread at exit.
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending = executor.submit(self.write, content, Path(path), names)
        executor.shutdown(wait=False)

    def wait(self) -> None:
        """Wait for the file that is being written; raise the error of a write that failed unexpectedly."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def teardown(self) -> None:
        """Called by Lightning at the end of the run."""
        self.wait()
