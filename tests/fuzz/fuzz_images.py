"""Fuzz the decoding of images: `python tests/fuzz/fuzz_images.py -max_total_time=640 -rss_limit_mb=4096`.

The first byte of an input selects the settings, the other bytes are the file. In half of the inputs, the checksums of
PNG chunks are corrected; otherwise, the decoder would reject nearly all mutations.
"""

# ruff: noqa: E402 - instrumented modules must be imported inside the `with` statement
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
MAX_SEED_BYTES = 20_000
"""Longer seeds are slow to mutate."""
CORRECT = 8
"""The bit of the first byte that selects corrected checksums."""

# A small limit, so that thousands of inputs per minute can be decoded. Larger images are refused, as with the default.
PIL.Image.MAX_IMAGE_PIXELS = 250_000


def seeds() -> Iterator[bytes]:
    """All kinds of images in the tests of decoding, with each of the settings for this kind."""
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


def with_correct_checksums(content: bytes) -> bytes:
    """A PNG with correct checksums, up to the first invalid chunk length."""
    parts, at = [PNG], len(PNG)
    while at + 12 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        body = content[at + 4 : at + 8 + length]
        parts.append(struct.pack(">I", length) + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + length
    return b"".join(parts)


def decode_all(data: bytes) -> None:
    """Decode an image with PIL, as pixels, and as stored values, as the loader and `dino data` do."""
    settings, content = data[0], data[1:]
    if settings & CORRECT and content.startswith(PNG):
        content = with_correct_checksums(content)
    decoder = DECODERS[settings % len(DECODERS)]
    sizes = set()
    for decode_image in (decoder.pil, decoder.pixels, decoder.stored):
        try:
            image = decode_image(content)
        except UNREADABLE as error:
            reason = why_unreadable(error)  # raises errors that would end a run
            if not reason or "\n" in reason:
                raise AssertionError(f"the reason {reason!r}") from error
            continue
        if isinstance(image, torch.Tensor):
            assert image.dtype == torch.uint8
            assert image.shape[0] == decoder.channels
            sizes.add((image.shape[2], image.shape[1]))
        elif decode_image == decoder.pil:
            assert image.mode == {1: "L", 3: "RGB"}[decoder.channels]
            sizes.add(image.size)
    assert len(sizes) < 2, f"decodings disagree: {sizes}"


def main() -> None:
    tifffile.TiffFile  # noqa: B018 - imported for its instrumentation
    decode.Decoder  # noqa: B018
    for seed in seeds():  # plugins and codecs are imported at first use, which the guard would refuse
        try:
            decode_all(seed)
        except AssertionError as error:
            print(f"seed: {error}", file=sys.stderr)
    findings = harness.Findings(harness.folder("images") / "findings", harness.Guard())

    def target(data: bytes) -> None:
        if data:
            findings.run(data, decode_all, ())

    harness.fuzz("images", (seed for seed in seeds() if len(seed) < MAX_SEED_BYTES), target)


if __name__ == "__main__":
    main()
