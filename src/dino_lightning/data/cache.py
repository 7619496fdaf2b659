"""`data.cache`: images decoded and shrunk once, in one file of pixels that all processes of a machine map.

    FOLDER/KEY/pixels.bin     the pixels of all images, (H, W, C) uint8 each, one behind another
    FOLDER/KEY/offsets.npy    where an image begins (n,) int64
    FOLDER/KEY/sizes.npy      height and width (n, 2) int32; 0 and the length of the reason where an image cannot be
                              read: the reason stands in its place
    FOLDER/KEY/meta.json      what it is, for a person, and the length of pixels.bin

The key is a digest of the source's fingerprint and of every setting that decides pixels, so a folder never changes once
it is there. It is built under another name and renamed at the end: what a killed process leaves is not taken for whole,
and the next build removes it. `disk` keeps the folder in `data.cache_dir`, where an unreadable image stays so until
somebody removes the folder; `ram` in the memory file system, from where the last process that uses it removes it.
"""

import json
import mmap
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console

from dino_lightning.config import DataConfig
from dino_lightning.data.bad_images import BadImages
from dino_lightning.data.cache_build import bytes_needed, write_images
from dino_lightning.data.decode import Decoder, UnreadableImageError
from dino_lightning.data.sources.base import ImageSource, Subset, content_digest
from dino_lightning.errors import UserError, did_you_mean

FORMAT = 1
"""Raised when the same settings come to mean other pixels or other files."""
CHOICES = ("none", "ram", "disk")
PATIENCE_SECONDS = 1.0
"""A process that waits longer for another one says so."""


def cached(
    source: ImageSource, *, config: DataConfig, decoder: Decoder, bad_images: Path | None, workers: int
) -> ImageSource:
    """`source` as `data.cache` says: itself, or a `CachedImages` of its pixels.

    All ranks call it. The first decodes in `workers` processes (0: in this one), the others wait for it. Unreadable
    images do not stop that: they are added to the list `bad_images`, and `read` raises when their turn comes.
    """
    if config.cache not in CHOICES:
        raise UserError(f"data.cache={config.cache} is not known; {did_you_mean(config.cache, CHOICES)}")
    if config.cache == "none":
        return source
    if config.cache_resize < 1:
        raise UserError(f"data.cache_resize={config.cache_resize} is not a size; give pixels, such as 256")
    # A hold-out changes with the seed. Its few images more are cheaper than a cache for each seed.
    part = source if isinstance(source, Subset) and 2 * len(source) >= len(source.source) else None
    whole = source if part is None else part.source
    folder = cache_root(config) / _key(whole, config)
    user = MemoryUser(folder) if config.cache == "ram" else None
    with _alone(folder):
        if not _is_whole(folder):
            _build(folder, source=whole, config=config, decoder=decoder, workers=workers)
    images = CachedImages(whole, folder=folder, channels=config.channels, user=user)
    kept = images if part is None else Subset(images, indices=part.indices)
    if bad_images is not None:
        unreadable = images.unreadable if part is None else images.unreadable[part.indices]
        _list(kept, np.flatnonzero(unreadable), bad_images)
    return kept


class _Files(NamedTuple):
    pixels: mmap.mmap
    offsets: np.ndarray
    sizes: np.ndarray


class CachedImages:
    """The images of `source` as they stand in `folder`; its labels, classes and names.

    An image is a view (H, W, C) uint8 of the mapped file, not a copy, and read-only. `torch.from_numpy` makes a tensor
    of it without a copy too, but warns once per process that PyTorch knows no read-only tensors: whoever does so
    filters "The given NumPy array is not writable". Unpickled in another process, it maps the file by its path.
    """

    def __init__(self, source: ImageSource, *, folder: Path, channels: int, user: "MemoryUser | None" = None) -> None:
        self.source, self.folder, self.channels = source, folder, channels
        self.user = user
        # Mapped before loader processes are forked; and in memory, as long as somebody holds it.
        assert len(self._files.offsets) == len(source)

    @property
    def classes(self) -> list[str] | None:
        """The source's."""
        return self.source.classes

    @property
    def labels(self) -> np.ndarray | None:
        """The source's."""
        return self.source.labels

    @property
    def unreadable(self) -> np.ndarray:
        """Mask (n,) of the images that cannot be read."""
        return self._files.sizes[:, 0] == 0

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> np.ndarray:
        """The pixels (H, W, C). Raises `UnreadableImageError` with the reason that was found when it was decoded."""
        pixels, offsets, sizes = self._files
        start, (height, width) = int(offsets[index]), sizes[index].tolist()
        if not height:
            raise UnreadableImageError(pixels[start : start + width].decode())
        flat = np.frombuffer(pixels, np.uint8, count=height * width * self.channels, offset=start)
        return flat.reshape(height, width, self.channels)

    def describe(self, index: int) -> str:
        """The source's name of the image."""
        return self.source.describe(index)

    def fingerprint(self) -> str:
        """The source's."""
        return self.source.fingerprint()

    @cached_property
    def _files(self) -> _Files:
        with open(self.folder / "pixels.bin", "rb") as file:
            pixels = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # asarray: a plain view of the mapping, which is faster to index.
        offsets, sizes = (np.asarray(np.load(self.folder / f"{n}.npy", mmap_mode="r")) for n in ("offsets", "sizes"))
        return _Files(pixels, offsets, sizes)

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "folder": self.folder, "channels": self.channels, "user": None}


class MemoryUser:
    """A process's claim on a folder in memory: a shared lock on the file `FOLDER.users`, which ends with the process.

    Whoever goes last removes the folder. Loader processes have no claim of their own: they end before their parent, and
    a forked one shares its parent's lock.
    """

    def __init__(self, folder: Path) -> None:
        remove_unused(folder)
        lock = os.open(f"{folder}.users", os.O_RDWR | os.O_CREAT, 0o600)
        _lock(lock, "shared")
        weakref.finalize(self, _leave, folder, lock=lock, process=os.getpid())


def remove_unused(folder: Path) -> None:
    """Remove what killed processes left beside `folder`, which itself may still be of use."""
    for users in folder.parent.glob("*.users"):
        if users.stem != folder.name:
            _leave(users.with_suffix(""), lock=os.open(users, os.O_RDWR), process=os.getpid())


def _leave(folder: Path, *, lock: int, process: int) -> None:
    if os.getpid() != process:
        return
    try:
        _lock(lock, "alone")
    except OSError:
        pass  # there are other users
    else:
        for remains in (folder, *_parts(folder)):
            shutil.rmtree(remains, ignore_errors=True)
    # Explicitly: a forked process that lives longer would keep it.
    _lock(lock, "off")
    os.close(lock)


def _lock(lock: int, kind: Literal["shared", "alone", "off"]) -> None:
    import fcntl  # not on Windows, where `cache_root` refuses

    kinds = {"shared": fcntl.LOCK_SH, "alone": fcntl.LOCK_EX | fcntl.LOCK_NB, "off": fcntl.LOCK_UN}
    fcntl.flock(lock, kinds[kind])


def cache_root(config: DataConfig) -> Path:
    """The folder of all kept images. Raises `UserError` where it cannot be made."""
    if config.cache == "disk":
        root = Path(config.cache_dir).expanduser() / "images"
    elif not hasattr(os, "getuid"):
        raise UserError("data.cache=ram is for Linux and macOS; take data.cache=disk")
    else:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
        root = Path(memory) / f"dino-lightning-{os.getuid()}"
    try:
        root.mkdir(mode=0o777 if config.cache == "disk" else 0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"data.cache_dir={config.cache_dir} cannot be made ({error}); give a folder of yours"
        ) from error
    return root


def _key(source: ImageSource, config: DataConfig) -> str:
    decisive = [FORMAT, config.cache_resize, config.channels, config.value_range, config.apply_exif_rotation]
    if config.nan_value is not None:
        decisive.append(config.nan_value)
    return content_digest(source.fingerprint().encode(), json.dumps(decisive).encode())


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=PATIENCE_SECONDS)
    except Timeout:
        _say(f"data.cache: waiting for the process that decodes the images into {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _is_whole(folder: Path) -> bool:
    try:
        length = json.loads((folder / "meta.json").read_text())["bytes"]
        return (folder / "pixels.bin").stat().st_size == length
    except (OSError, ValueError, KeyError):
        return False


def _parts(folder: Path) -> list[Path]:
    return list(folder.parent.glob(f"{folder.name}.part-*"))


def _build(folder: Path, *, source: ImageSource, config: DataConfig, decoder: Decoder, workers: int) -> None:
    for remains in (folder, *_parts(folder)):
        shutil.rmtree(remains, ignore_errors=True)
    needed = bytes_needed(source, decoder=decoder, resize=config.cache_resize)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        way_out = "take data.cache=disk" if config.cache == "ram" else "give a roomier data.cache_dir"
        raise UserError(
            f"data.cache={config.cache} needs about {needed / 1e9:.1f} GB in {folder.parent}, where "
            f"{free / 1e9:.1f} GB are free; {way_out} or a data.cache_resize below {config.cache_resize}"
        )
    _say(f"data.cache={config.cache}: decoding {len(source)} images into {folder}, about {needed / 1e6:,.0f} MB")
    # The name is new: a process of a killed build may still write to its own.
    part = folder.with_name(f"{folder.name}.part-{secrets.token_hex(4)}")
    part.mkdir()
    try:
        meta = write_images(source, folder=part, decoder=decoder, resize=config.cache_resize, workers=workers)
        (part / "meta.json").write_text(json.dumps({"format": FORMAT, "resize": config.cache_resize, **meta}, indent=1))
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _list(images: ImageSource, positions: np.ndarray, path: Path) -> None:
    bad = BadImages(path, images=len(images), on_error="skip", max_bad_share=1)
    for position in positions.tolist():
        try:
            images.read(position)
        except UnreadableImageError as error:
            bad.add(images.describe(position), str(error))


def _say(text: str) -> None:
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)
