"""Pictures to look at: images, or a clip, whose frames come one after another.

A clip is an animated GIF, WebP, PNG or AVIF, a video, or a folder of frames. Videos are read by PyAV where it is
installed: `pip install av`.
"""

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageSequence, UnidentifiedImageError

from dino_lightning.config import DataConfig, PicturesData
from dino_lightning.data.bad_images import UNREADABLE, why_unreadable
from dino_lightning.data.benchmarks.files import images_in, size_of
from dino_lightning.data.decode import Decoder
from dino_lightning.data.sources.folder import existing_path
from dino_lightning.errors import UserError

ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
"""PIL's formats whose pages are frames; those of TIFF and of cameras' MPO are not."""
FEWEST_FRAMES = 3
"""Fewer numbered images of one size are no clip of themselves."""

FAULTS = (*UNREADABLE, LookupError)
"""What PIL raises where an animation is cut off in the middle."""

OnBad = Callable[[str, str], None]
"""Hears the name and the fault of what cannot be read."""


class Clip(Protocol):
    """Frames that are read from the first to the last."""

    @property
    def name(self) -> str:
        """How to call it."""
        ...

    def count(self) -> int:
        """Number of frames; may decode all of them."""
        ...

    def frames(self, on_bad: OnBad) -> Iterator[tuple[int, Image.Image]]:
        """Number and picture (RGB) of each frame that can be read, all of one size. After a fault within a file,
        nothing more comes."""
        ...


@dataclass(frozen=True)
class Pictures:
    """What `data.path` holds: images, or one clip."""

    root: Path
    """The folder of the images."""
    images: list[Path]
    clip: Clip | None = None


def open_pictures(config: PicturesData) -> Pictures:
    """The images or the clip at `data.path`.

    Raises `UserError` for a path that does not exist, a folder without images, and a file that is neither image nor
    video, or a video that cannot be read without PyAV.
    """
    path = existing_path(config.path, key="data.path", files=True)
    if path.is_dir():
        files = images_in(path, key="data.path", below=True)
        is_clip = _numbered(files) if config.clip is None else config.clip
        return Pictures(path, files, FrameFiles(path.name, files) if is_clip else None)
    try:
        with Image.open(path) as image:
            animated = image.format in ANIMATED and getattr(image, "is_animated", False)
    except UnidentifiedImageError:
        return Pictures(path.parent, [], _video(path, config))
    except FAULTS as error:
        raise UserError(f"data.path={config.path} cannot be read ({why_unreadable(error)}).") from error
    clip = Animation(path) if animated and config.clip is not False else None
    return Pictures(path.parent, [] if clip else [path], clip)


@dataclass
class FrameFiles:
    """A folder of frames, in the order of their names."""

    name: str
    files: list[Path]

    def count(self) -> int:
        """Number of files."""
        return len(self.files)

    def frames(self, on_bad: OnBad) -> Iterator[tuple[int, Image.Image]]:
        """As of `Clip`."""
        decoder, fitted = Decoder(DataConfig()), OneSize()
        for number, path in enumerate(self.files):
            try:
                frame = decoder.pil(path.read_bytes())
            except UNREADABLE as error:
                on_bad(str(path), why_unreadable(error))
                continue
            yield number, fitted(frame)


@dataclass
class Animation:
    """The frames of a file that PIL reads."""

    path: Path

    @property
    def name(self) -> str:
        """The file's, without its ending."""
        return self.path.stem

    def count(self) -> int:
        """As the file says, or those up to a fault."""
        try:
            with Image.open(self.path) as image:
                return getattr(image, "n_frames", 1)
        except FAULTS:
            return sum(1 for _ in self.frames(lambda *_: None))

    def frames(self, on_bad: OnBad) -> Iterator[tuple[int, Image.Image]]:
        """As of `Clip`."""
        number = 0
        try:
            with Image.open(self.path) as image:
                for number, page in enumerate(ImageSequence.Iterator(image)):
                    yield number, opaque(page)
        except FAULTS as error:
            on_bad(f"{self.path}, after frame {number}", why_unreadable(error))


@dataclass
class Video:
    """The frames of a file that PyAV reads, turned as a phone says that it was held."""

    path: Path

    @property
    def name(self) -> str:
        """The file's, without its ending."""
        return self.path.stem

    def count(self) -> int:
        """By decoding all of them: what a container says is often wrong."""
        return sum(1 for _ in self._decoded(lambda *_: None))

    def frames(self, on_bad: OnBad) -> Iterator[tuple[int, Image.Image]]:
        """As of `Clip`."""
        fitted = OneSize()
        for number, frame in enumerate(self._decoded(on_bad)):
            picture = frame.to_image()
            rotation = getattr(frame, "rotation", 0)
            yield number, fitted(picture.rotate(rotation, expand=True) if rotation else picture)

    def _decoded(self, on_bad: OnBad) -> Iterator[Any]:
        import av  # pyright: ignore[reportMissingImports]

        number = 0
        try:
            with av.open(str(self.path)) as container:
                for frame in container.decode(video=0):
                    yield frame
                    number += 1
        except (OSError, ValueError, IndexError) as error:  # PyAV's errors are among these
            on_bad(f"{self.path}, after frame {number}", why_unreadable(error))


class OneSize:
    """Frames as large as the first one: what follows it in another size is stretched."""

    def __init__(self) -> None:
        self.size: tuple[int, int] | None = None

    def __call__(self, frame: Image.Image) -> Image.Image:
        """The frame in the size of the first one."""
        self.size = self.size or frame.size
        return frame if frame.size == self.size else frame.resize(self.size, Image.Resampling.BICUBIC)


def opaque(image: Image.Image) -> Image.Image:
    """In RGB, on white where it is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _numbered(files: list[Path]) -> bool:
    """Whether these are frames: names that count up by one, and one size."""
    found = [re.fullmatch(r"(.*?)(\d+)", path.stem) for path in files]
    names = [(match[1], int(match[2])) for match in found if match]
    if len(names) < max(len(files), FEWEST_FRAMES) or len({path.parent for path in files}) > 1:
        return False
    (prefix, first), sizes = names[0], {size_of(path) for path in files} - {None}
    return names == [(prefix, first + i) for i in range(len(names))] and len(sizes) == 1


def _video(path: Path, config: PicturesData) -> Video:
    if importlib.util.find_spec("av") is None:
        raise UserError(
            f"data.path={config.path} is no image that PIL knows; if it is a video, reading it needs PyAV: "
            "pip install av."
        )
    import av  # pyright: ignore[reportMissingImports]

    try:
        with av.open(str(path)) as container:
            found = bool(container.streams.video)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"data.path={config.path} is neither an image that PIL knows nor a video that PyAV knows ({why})."
        ) from error
    if not found:
        raise UserError(f"data.path={config.path} has no pictures in it, only sound or text.")
    return Video(path)
