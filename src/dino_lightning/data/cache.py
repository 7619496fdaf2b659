"""`data.cache`: images decoded and resized once, in one file of pixels that all processes of a machine map.

    FOLDER/KEY/pixels.bin     the pixels of all images, (H, W, C) uint8 each, concatenated
    FOLDER/KEY/offsets.npy    start of each image (n,) int64
    FOLDER/KEY/sizes.npy      height and width (n, 2) int32; for an unreadable image, 0 and the length of the reason, a
                              text in pixels.bin
    FOLDER/KEY/meta.json      a description, and the length of pixels.bin

The key is a digest of the source's fingerprint and of every setting that affects pixels, so a folder never changes. It
is built under another name and renamed when complete; the next build removes the unfinished folder of a killed process.
With `disk`, the folder is in `data.cache_dir`, and an unreadable image stays unreadable until the folder is removed.
With `ram`, it is in the memory file system, and the last process that uses it removes it.
"""

import json
import mmap
import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dino_lightning.config import DataConfig
from dino_lightning.data.bad_images import BadImages
from dino_lightning.data.cache_build import bytes_needed, write_images
from dino_lightning.data.decode import Decoder, UnreadableImageError
from dino_lightning.data.sources.base import ImageSource, Subset, content_digest
from dino_lightning.data.sources.mapped_arrays import MappedArrays, open_stored
from dino_lightning.errors import UserError
from dino_lightning.runtime.console import say
from dino_lightning.runtime.files import atomic_folder
from dino_lightning.runtime.locks import exclusive

FORMAT = 1
"""Increased when the same settings produce other pixels or other files."""


def cached(
    source: ImageSource, *, config: DataConfig, decoder: Decoder, bad_images: Path | None, workers: int
) -> ImageSource:
    """`source` itself, or a `CachedImages` with its pixels, depending on `data.cache`.

    All ranks call it. The first one decodes in `workers` processes (0: in this one), the others wait for it. Unreadable
    images do not stop it: they are added to the list `bad_images`, and `read` raises an error for them.
    """
    if config.cache == "none":
        return source
    # A hold-out depends on the seed, so all images are cached: a few more images are cheaper than a cache per seed.
    subset = source if isinstance(source, Subset) and 2 * len(source) >= len(source.source) else None
    complete = source if subset is None else subset.source
    folder = cache_root(config) / _key(complete, config)
    claim = MemoryClaim(folder) if config.cache == "ram" else None
    waiting = f"data.cache: waiting for the process that decodes the images into {folder}"
    with exclusive(Path(f"{folder}.lock"), on_wait=lambda: say(waiting)):
        if not _is_complete(folder):
            _build(folder, source=complete, config=config, decoder=decoder, workers=workers)
    images = CachedImages(complete, folder=folder, channels=config.channels, claim=claim)
    selected = images if subset is None else Subset(images, indices=subset.indices)
    if bad_images is not None:
        unreadable = images.unreadable if subset is None else images.unreadable[subset.indices]
        _list_unreadable(selected, np.flatnonzero(unreadable), bad_images)
    return selected


class CachedImages:
    """The images of `source` as cached in `folder`, with its labels, classes and names.

    An image is a read-only view (H, W, C) uint8 of the mapped file. `torch.from_numpy` creates a tensor without a copy
    too, but warns once per process that PyTorch does not support read-only tensors; callers filter the warning "The
    given NumPy array is not writable". After unpickling in another process, the file is mapped by its path.
    """

    def __init__(self, source: ImageSource, *, folder: Path, channels: int, claim: "MemoryClaim | None" = None) -> None:
        self.source, self.folder, self.channels, self.claim = source, folder, channels, claim
        # Mapped here, before loader processes are forked, and while the claim keeps a folder in memory.
        assert len(self._files[1]["offsets"]) == len(source)

    @property
    def classes(self) -> list[str] | None:
        """The source's class names."""
        return self.source.classes

    @property
    def labels(self) -> np.ndarray | None:
        """The source's labels."""
        return self.source.labels

    @property
    def unreadable(self) -> np.ndarray:
        """Mask (n,) of the unreadable images."""
        return self._files[1]["sizes"][:, 0] == 0

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> np.ndarray:
        """The pixels (H, W, C). Raises `UnreadableImageError` with the reason why the image could not be decoded."""
        pixels, arrays = self._files
        start, (height, width) = int(arrays["offsets"][index]), arrays["sizes"][index].tolist()
        if not height:
            raise UnreadableImageError(pixels[start : start + width].decode())
        flat = np.frombuffer(pixels, np.uint8, count=height * width * self.channels, offset=start)
        return flat.reshape(height, width, self.channels)

    def describe(self, index: int) -> str:
        """The source's name of the image."""
        return self.source.describe(index)

    def fingerprint(self) -> str:
        """The source's fingerprint."""
        return self.source.fingerprint()

    @cached_property
    def _files(self) -> tuple[mmap.mmap, MappedArrays]:
        with open(self.folder / "pixels.bin", "rb") as file:
            pixels = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return pixels, open_stored(self.folder)

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "folder": self.folder, "channels": self.channels, "claim": None}


class MemoryClaim:
    """A process's claim on a folder in memory: a shared lock on the file `FOLDER.users`, which ends with the process.

    The last process removes the folder. Loader processes have no claims: they end before their parent, and a forked one
    shares its parent's lock.
    """

    def __init__(self, folder: Path) -> None:
        import fcntl  # not available on Windows, where `cache_root` raises an error

        remove_unused(folder)
        descriptor = os.open(f"{folder}.users", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        weakref.finalize(self, _release, folder, descriptor=descriptor, process=os.getpid())


def remove_unused(folder: Path) -> None:
    """Remove the folders of killed processes next to `folder`, but not `folder` itself, which may still be used."""
    for users in folder.parent.glob("*.users"):
        if users.stem != folder.name:
            _release(users.with_suffix(""), descriptor=os.open(users, os.O_RDWR), process=os.getpid())


def _release(folder: Path, *, descriptor: int, process: int) -> None:
    import fcntl

    if os.getpid() != process:
        return
    with suppress(OSError):  # raised while other processes use the folder
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(folder)
    # Explicitly, because a forked process that lives longer would keep the lock.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def cache_root(config: DataConfig) -> Path:
    """The folder of all caches. Raises `UserError` if it cannot be created."""
    if config.cache == "disk":
        root = Path(config.cache_dir).expanduser() / "images"
    elif not hasattr(os, "getuid"):
        raise UserError("data.cache=ram needs Linux or macOS; use data.cache=disk")
    else:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
        root = Path(memory) / f"dino-lightning-{os.getuid()}"
    try:
        root.mkdir(mode=0o777 if config.cache == "disk" else 0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"data.cache_dir={config.cache_dir} cannot be created ({error}); choose a folder that you can write to"
        ) from error
    return root


def _key(source: ImageSource, config: DataConfig) -> str:
    settings = [FORMAT, config.cache_resize, config.channels, config.value_range, config.apply_exif_rotation]
    if config.nan_value is not None:
        settings.append(config.nan_value)
    return content_digest(source.fingerprint().encode(), json.dumps(settings).encode())


def _is_complete(folder: Path) -> bool:
    try:
        length = json.loads((folder / "meta.json").read_text())["bytes"]
        return (folder / "pixels.bin").stat().st_size == length
    except (OSError, ValueError, KeyError):
        return False


def _remove(folder: Path) -> None:
    """Remove a cache and its unfinished builds."""
    for path in (folder, *folder.parent.glob(f".{folder.name}.*.part")):
        shutil.rmtree(path, ignore_errors=True)


def _build(folder: Path, *, source: ImageSource, config: DataConfig, decoder: Decoder, workers: int) -> None:
    _remove(folder)
    needed = bytes_needed(source, decoder=decoder, resize=config.cache_resize)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        hint = "use data.cache=disk" if config.cache == "ram" else "choose a data.cache_dir with more space"
        raise UserError(
            f"data.cache={config.cache} needs about {needed / 1e9:.1f} GB in {folder.parent}, where "
            f"{free / 1e9:.1f} GB are free; {hint} or a data.cache_resize below {config.cache_resize}"
        )
    say(f"data.cache={config.cache}: decoding {len(source)} images into {folder}, about {needed / 1e6:,.0f} MB")
    with atomic_folder(folder) as unfinished:
        meta = write_images(source, folder=unfinished, decoder=decoder, resize=config.cache_resize, workers=workers)
        meta = {"format": FORMAT, "resize": config.cache_resize, **meta}
        (unfinished / "meta.json").write_text(json.dumps(meta, indent=1))


def _list_unreadable(images: ImageSource, positions: np.ndarray, path: Path) -> None:
    bad = BadImages(path, images=len(images))
    for position in positions.tolist():
        try:
            images.read(position)
        except UnreadableImageError as error:
            bad.add(images.describe(position), str(error))
