"""A picture of videos with their masks in color."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dino_lightning.report.pictures.sheets import GAP, INK, PAPER, mask_border

COLORS = [
    (213, 94, 0),
    (0, 114, 178),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (86, 180, 233),
    (230, 159, 0),
]
"""Of objects 1, 2, ..., then again from the first; Okabe and Ito's, told apart under color blindness."""
LINE = 24
"""Height of a line of text (pixels)."""


def video_sheet(rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]], *, cell: int = 280) -> Image.Image:
    """A row for each video: its heading, and frames at most `cell` pixels wide, each with its caption below."""
    cell = min(cell, max(frame.width for _, frames in rows for _, frame in frames))
    heights = [max(round(cell * frame.height / frame.width) for _, frame in frames) for _, frames in rows]
    most = max(len(frames) for _, frames in rows)
    size = (GAP + most * (cell + GAP), GAP + sum(height + 2 * LINE + GAP for height in heights))
    sheet = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    top = GAP
    for (heading, frames), height in zip(rows, heights, strict=True):
        draw.text((GAP, top + LINE / 2), heading, fill=INK, font=font, anchor="lm")
        for i, (caption, frame) in enumerate(frames):
            left = GAP + i * (cell + GAP)
            sheet.paste(frame.resize((cell, height), Image.Resampling.LANCZOS), (left, top + LINE))
            draw.text((left + cell / 2, top + LINE + height + LINE / 2), caption, fill=INK, font=font, anchor="mm")
        top += height + 2 * LINE + GAP
    return sheet


def colored(frame: Image.Image, labels_HW: np.ndarray) -> Image.Image:
    """A frame with its objects tinted and outlined."""
    pixels = np.asarray(frame.convert("RGB")).copy()
    for number in range(1, int(labels_HW.max()) + 1):
        mask, color = labels_HW == number, np.array(COLORS[(number - 1) % len(COLORS)])
        pixels[mask] = (pixels[mask] * 0.45 + color * 0.55).round().astype(np.uint8)
        pixels[mask_border(mask)] = PAPER
    return Image.fromarray(pixels)


def plain_palette() -> list[int]:
    """Colors for 256 numbers, r, g, b of each: black, then `COLORS` again and again."""
    repeated = [COLORS[i % len(COLORS)] for i in range(255)]
    return [0, 0, 0, *(value for color in repeated for value in color)]
