"""Images, or a clip, for visualizations.

A clip is an animated GIF, WebP, PNG or AVIF, a video, or a folder of frames. Videos need PyAV (`pip install av`).
"""

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image, ImageSequence, UnidentifiedImageError

from dino_lightning.config import DataConfig, PicturesData
from dino_lightning.data.bad_images import UNREADABLE, why_unreadable
from dino_lightning.data.benchmarks.files import image_size, list_images
from dino_lightning.data.decode import Decoder
from dino_lightning.data.sources.folder import existing_path
from dino_lightning.errors import UserError

ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
"""PIL's formats whose pages are frames, unlike those of TIFF and of MPO, a camera format."""
MIN_FRAMES = 3
"""Numbered images of one size from which on a folder is treated as a clip."""

BROKEN = (*UNREADABLE, LookupError)
"""Errors of PIL for truncated animations."""

OnBad = Callable[[str, str], None]
"""Called with the name of an unreadable file or frame, and the reason."""


@dataclass
class FrameFiles:
    """A folder of frames, in the order of their names."""

    name: str
    files: list[Path]

    def count(self) -> int:
        """Number of files."""
        return len(self.files)

    def frames(self, on_bad: OnBad) -> Iterator[tuple[int, Image.Image]]:
        """See `Clip`."""
        return _of_one_size(self._readable(on_bad))

    def _readable(self, on_bad: OnBad) -> Iterator[tuple[int, Image.Image]]:
        decoder = Decoder(DataConfig())
        for number, path in enumerate(self.files):
            try:
                yield number, decoder.pil(path.read_bytes())
            except UNREADABLE as error:
                on_bad(str(path), why_unreadable(error))


@dataclass
class ClipFile:
    """A clip in one file."""

    path: Path

    @property
    def name(self) -> str:
        """The file name without its extension."""
        return self.path.stem


class Animation(ClipFile):
    """An animation that PIL reads."""

    def count(self) -> int:
        """The number in the file, or the number of readable frames."""
        try:
            with Image.open(self.path) as image:
                return getattr(image, "n_frames", 1)
        except BROKEN:
            return sum(1 for _ in self.frames(lambda *_: None))

    def frames(self, on_bad: OnBad) -> Iterator[tuple[int, Image.Image]]:
        """See `Clip`."""
        number = 0
        try:
            with Image.open(self.path) as image:
                for number, page in enumerate(ImageSequence.Iterator(image)):
                    yield number, opaque(page)
        except BROKEN as error:
            on_bad(f"{self.path}, after frame {number}", why_unreadable(error))


class Video(ClipFile):
    """A video that PyAV reads, with the rotation in its metadata applied."""

    def count(self) -> int:
        """The number of decoded frames, because the number in the file is often wrong."""
        return sum(1 for _ in self._decoded(lambda *_: None))

    def frames(self, on_bad: OnBad) -> Iterator[tuple[int, Image.Image]]:
        """See `Clip`."""
        frames = self._decoded(on_bad)
        upright = (frame.to_image().rotate(getattr(frame, "rotation", 0), expand=True) for frame in frames)
        return _of_one_size(enumerate(upright))

    def _decoded(self, on_bad: OnBad) -> Iterator[Any]:
        import av  # pyright: ignore[reportMissingImports]

        number = 0
        try:
            with av.open(str(self.path)) as container:
                for frame in container.decode(video=0):
                    yield frame
                    number += 1
        except (OSError, ValueError, IndexError) as error:  # PyAV's errors are subclasses of these
            on_bad(f"{self.path}, after frame {number}", why_unreadable(error))


Clip: TypeAlias = FrameFiles | Animation | Video
"""Frames that are read sequentially.

`count()` is their number and may decode all of them. `frames(on_bad)` are the number and image (RGB) of each readable
frame, all with one size, up to the first error within a file.
"""


@dataclass(frozen=True)
class Pictures:
    """The content of `data.path`: images, or one clip."""

    root: Path
    """The folder of the images."""
    images: list[Path]
    clip: Clip | None = None


def open_pictures(config: PicturesData) -> Pictures:
    """The images or the clip in `data.path`.

    Raises `UserError` for a path that does not exist, a folder without images, a file that is neither an image nor a
    video, and a video if PyAV is not installed.
    """
    path = existing_path(config.path, key="data.path", files=True)
    if path.is_dir():
        files = list_images(path, key="data.path", recursive=True)
        is_clip = _are_frames(files) if config.clip is None else config.clip
        return Pictures(path, files, FrameFiles(path.name, files) if is_clip else None)
    try:
        with Image.open(path) as image:
            animated = image.format in ANIMATED and getattr(image, "is_animated", False)
    except UnidentifiedImageError:
        return Pictures(path.parent, [], _video(path, config))
    except BROKEN as error:
        raise UserError(f"data.path={config.path} cannot be read ({why_unreadable(error)}).") from error
    clip = Animation(path) if animated and config.clip is not False else None
    return Pictures(path.parent, [] if clip else [path], clip)


def _of_one_size(frames: Iterator[tuple[int, Image.Image]]) -> Iterator[tuple[int, Image.Image]]:
    """The frames, resized to the size of the first one, without keeping their aspect ratio."""
    size = None
    for number, frame in frames:
        size = size or frame.size
        yield number, frame if frame.size == size else frame.resize(size, Image.Resampling.BICUBIC)


def opaque(image: Image.Image) -> Image.Image:
    """The image in RGB, on a white background if it is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _are_frames(files: list[Path]) -> bool:
    """Whether the files are frames of a clip: consecutively numbered images with one size."""
    matches = [re.fullmatch(r"(.*?)(\d+)", path.stem) for path in files]
    names = [(match[1], int(match[2])) for match in matches if match]
    if len(names) < max(len(files), MIN_FRAMES) or len({path.parent for path in files}) > 1:
        return False
    (prefix, first), sizes = names[0], {image_size(path) for path in files} - {None}
    return names == [(prefix, first + i) for i in range(len(names))] and len(sizes) == 1


def _video(path: Path, config: PicturesData) -> Video:
    if importlib.util.find_spec("av") is None:
        raise UserError(
            f"data.path={config.path} is not an image format that PIL supports; if it is a video, install PyAV: pip "
            "install av."
        )
    import av  # pyright: ignore[reportMissingImports]

    try:
        with av.open(str(path)) as container:
            has_video = bool(container.streams.video)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"data.path={config.path} is neither an image format that PIL supports nor a video that PyAV reads ({why})."
        ) from error
    if not has_video:
        raise UserError(f"data.path={config.path} contains no video, only sound or text.")
    return Video(path)
