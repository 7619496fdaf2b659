"""Clip files: MP4 (H.264) with PyAV if it is installed, else an animated WebP or GIF with PIL."""

import importlib.util
from abc import ABC, abstractmethod
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

CODECS = ("libx264", "mpeg4")
"""Encoders of PyAV, the better one first; some builds do not have it."""
WEBP_QUALITY = 80
"""From 0 to 100."""


class ClipWriter(ABC):
    """A clip of frames of one size; a context manager."""

    def __init__(self, path: Path, *, frames_per_second: float) -> None:
        self.path, self.frames_per_second = path, frames_per_second

    def __enter__(self) -> "ClipWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def add(self, frame: Image.Image) -> None:
        """Append a frame (RGB)."""

    @abstractmethod
    def close(self) -> None:
        """Finish the file. Without frames, no file is written."""


class VideoWriter(ClipWriter):
    """MP4 with PyAV, written frame by frame."""

    def __init__(self, path: Path, *, frames_per_second: float) -> None:
        super().__init__(path, frames_per_second=frames_per_second)
        self.container: Any = None
        self.stream: Any = None

    def add(self, frame: Image.Image) -> None:
        """Append a frame, cropped to an even size, which H.264 needs for its subsampled colors."""
        import av  # pyright: ignore[reportMissingImports]

        pixels = np.asarray(frame.convert("RGB"))
        pixels = np.ascontiguousarray(pixels[: len(pixels) // 2 * 2, : pixels.shape[1] // 2 * 2])
        is_open = self.container is not None
        if not is_open:
            self._open(av, width=pixels.shape[1], height=pixels.shape[0])
        for packet in self.stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
            self.container.mux(packet)

    def close(self) -> None:
        """Write the frames that the encoder has buffered."""
        if self.container is None:
            return
        for packet in self.stream.encode(None):
            self.container.mux(packet)
        self.container.close()

    def _open(self, av: Any, *, width: int, height: int) -> None:
        self.container = av.open(str(self.path), mode="w")
        codec = next(name for name in CODECS if name in av.codecs_available)
        rate = Fraction(self.frames_per_second).limit_denominator(1000)
        options = {"crf": "18"} if codec == "libx264" else {"qscale": "3"}
        self.stream = self.container.add_stream(codec, rate=rate, options=options)
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"


class AnimationWriter(ClipWriter):
    """Animated WebP or GIF with PIL, which needs all frames at the end, so they are in memory until then."""

    def __init__(self, path: Path, *, frames_per_second: float) -> None:
        super().__init__(path, frames_per_second=frames_per_second)
        self.frames: list[Image.Image] = []

    def add(self, frame: Image.Image) -> None:
        """Store a frame until `close`."""
        self.frames.append(frame.convert("RGB"))

    def close(self) -> None:
        """Write the file."""
        if not self.frames:
            return
        first, *others = self.frames
        duration = round(1000 / self.frames_per_second)
        options: dict[str, Any] = {"quality": WEBP_QUALITY} if self.path.suffix == ".webp" else {}
        first.save(self.path, save_all=True, append_images=others, duration=duration, loop=0, **options)
        self.frames = []


def clip_suffix() -> str:
    """The best of `.mp4`, `.webp` and `.gif` that can be written on this machine."""
    if importlib.util.find_spec("av") is not None:
        return ".mp4"
    return ".webp" if features.check("webp") else ".gif"


def clip_writer(path: Path, *, frames_per_second: float) -> ClipWriter:
    """The writer for a path with one of these suffixes."""
    writer = VideoWriter if path.suffix == ".mp4" else AnimationWriter
    return writer(path, frames_per_second=frames_per_second)
