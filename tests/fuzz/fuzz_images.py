"""Fuzz the decoding of images: `python tests/fuzz/fuzz_images.py -max_total_time=640 -rss_limit_mb=4096`.

The first byte of an input chooses settings and decoding, the others are the file. Half of the inputs have the
checksums of their PNG chunks mended, or mutations would not come past them.
"""

# ruff: noqa: E402 - what is instrumented has to be imported in its own place
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parent)]
sys.setrecursionlimit(1000)

with atheris.instrument_imports(include=["PIL", "tifffile", "dino_lightning.data"], enable_loader_override=False):
    import PIL.Image
    import tifffile

    PIL.Image.init()  # the plugins of all formats

    from dino_lightning.data import decode
    from dino_lightning.data.bad_images import UNREADABLE, why_unreadable

import decode_cases as cases
import harness
import torch

PNG = b"\x89PNG\r\n\x1a\n"
SETTINGS = [
    {"channels": 3},
    {"channels": 1},
    {"channels": 3, "value_range": [0, 65535]},
    {"channels": 4},
    {"channels": 2, "value_range": [0, 1]},
    {"channels": 3, "apply_exif_rotation": True},
    {"channels": 1, "value_range": [-1, 1], "apply_exif_rotation": True},
    {"channels": 5},
]
DECODERS = [cases.decoder(**settings) for settings in SETTINGS]
LARGEST = 20_000
"""Bytes of a seed: longer ones are slow to mutate."""
MEND = 8
"""The bit of the first byte that asks for mended checksums."""

# Small enough that thousands of inputs a minute can be decoded; what is beyond it is refused as it is by default.
PIL.Image.MAX_IMAGE_PIXELS = 250_000


def seeds() -> Iterator[bytes]:
    """Every kind of image that the tests of decoding know, for each of the settings it is meant for."""
    for makers, numbers in ((cases.EXACT, (0, 1, 5, 8, 9)), (cases.LOSSY, (0, 1, 5))):
        for maker in makers.values():
            yield from (bytes([number]) + maker() for number in numbers)
    for maker in cases.DEEP.values():
        content = maker(cases.values(1, high=65536))
        if isinstance(content, bytes):
            yield from (bytes([number]) + content for number in (1, 2, 6, 10))
    for channels, number in ((2, 4), (4, 3), (5, 7)):
        for name, maker in cases.MANY.items():
            content = b"" if name.startswith("rgb") and channels < 3 else maker(cases.values(channels))
            if isinstance(content, bytes):
                yield bytes([number]) + content
    for form in ("ICO", "TGA", "PPM", "PCX", "SGI", "JPEG2000", "DDS", "ICNS", "AVIF", "IM", "MPO"):
        try:
            yield b"\0" + cases.encoded(cases.photo(), form)
        except (OSError, KeyError, ValueError):  # this Pillow is built without it
            continue


def mended(content: bytes) -> bytes:
    """A PNG with right checksums, as far as its chunks can be followed."""
    parts, at = [PNG], len(PNG)
    while at + 12 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        body = content[at + 4 : at + 8 + length]
        parts.append(struct.pack(">I", length) + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + length
    return b"".join(parts)


def decode_all(data: bytes) -> None:
    """Both decodings and the stored values, as the loader and `dino data` ask for them."""
    settings, content = data[0], data[1:]
    if settings & MEND and content.startswith(PNG):
        content = mended(content)
    decoder = DECODERS[settings % len(DECODERS)]
    sizes = set()
    for way in (decoder.pil, decoder.pixels, decoder.stored):
        try:
            found = way(content)
        except UNREADABLE as error:
            reason = why_unreadable(error)  # raises what would end a run
            if not reason or "\n" in reason:
                raise AssertionError(f"the reason {reason!r}") from error
            continue
        if isinstance(found, torch.Tensor):
            assert found.dtype == torch.uint8
            assert found.shape[0] == decoder.channels
            sizes.add((found.shape[2], found.shape[1]))
        elif way == decoder.pil:
            assert found.mode == {1: "L", 3: "RGB"}[decoder.channels]
            sizes.add(found.size)
    assert len(sizes) < 2, f"decodings disagree: {sizes}"


def main() -> None:
    tifffile.TiffFile  # noqa: B018 - imported for its instrumentation
    decode.Decoder  # noqa: B018
    for seed in seeds():  # plugins and codecs are imported at first use, outside the guard
        try:
            decode_all(seed)
        except AssertionError as error:
            print(f"seed: {error}", file=sys.stderr)
    findings = harness.Findings(harness.folder("images") / "findings", harness.Guard())

    def one(data: bytes) -> None:
        if data:
            findings.run(data, decode_all, ())

    harness.fuzz("images", (seed for seed in seeds() if len(seed) < LARGEST), one)


if __name__ == "__main__":
    main()
