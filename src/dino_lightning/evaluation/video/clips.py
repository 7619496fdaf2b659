"""Clip files: MP4 (H.264) with PyAV if it is installed, else an animated WebP or GIF with PIL."""

import importlib.util
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

CODECS = ("libx264", "mpeg4")
"""Encoders of PyAV, the better one first; some builds do not have it."""
WEBP_QUALITY = 80
"""From 0 to 100."""


def clip_suffix() -> str:
    """The best of `.mp4`, `.webp` and `.gif` that can be written on this machine."""
    if importlib.util.find_spec("av") is not None:
        return ".mp4"
    return ".webp" if features.check("webp") else ".gif"


def write_clip(path: Path, frames: Iterable[Image.Image], *, frames_per_second: float) -> None:
    """Write frames of one size to a path with one of these suffixes; without frames, no file is written."""
    if path.suffix == ".mp4":
        _write_video(path, iter(frames), frames_per_second=frames_per_second)
        return
    pages = [frame.convert("RGB") for frame in frames]  # PIL needs all of them at once
    if pages:
        quality: dict[str, Any] = {"quality": WEBP_QUALITY} if path.suffix == ".webp" else {}
        duration = round(1000 / frames_per_second)
        pages[0].save(path, save_all=True, append_images=pages[1:], duration=duration, loop=0, **quality)


def _write_video(path: Path, frames: Iterator[Image.Image], *, frames_per_second: float) -> None:
    """Write each frame at once, cropped to an even size, which H.264 needs for its subsampled colors."""
    import av  # pyright: ignore[reportMissingImports]

    first = next(frames, None)
    if first is None:
        return
    width, height = first.width // 2 * 2, first.height // 2 * 2
    codec = next(name for name in CODECS if name in av.codecs_available)
    with av.open(str(path), mode="w") as container:
        rate = Fraction(frames_per_second).limit_denominator(1000)
        options = {"crf": "18"} if codec == "libx264" else {"qscale": "3"}
        stream: Any = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in chain([first], frames):
            pixels = np.ascontiguousarray(np.asarray(frame.convert("RGB"))[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
