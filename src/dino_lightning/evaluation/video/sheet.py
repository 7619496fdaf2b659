"""The picture of videos with colored masks."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dino_lightning.report.pictures.sheets import GAP, INK, PAPER, mask_border

COLORS = [(213, 94, 0), (0, 114, 178), (0, 158, 115), (240, 228, 66), (204, 121, 167), (86, 180, 233), (230, 159, 0)]
"""Colors of objects 1, 2, ..., repeated; the color-blind-safe palette of Okabe and Ito."""
LINE_HEIGHT = 24
"""Height of a line of text (pixels)."""


def video_sheet(rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]], *, cell: int = 280) -> Image.Image:
    """A row per video: its heading, and frames of at most `cell` pixels width, each with its caption below."""
    cell = min(cell, max(frame.width for _, frames in rows for _, frame in frames))
    heights = [max(round(cell * frame.height / frame.width) for _, frame in frames) for _, frames in rows]
    columns = max(len(frames) for _, frames in rows)
    size = (GAP + columns * (cell + GAP), GAP + sum(height + 2 * LINE_HEIGHT + GAP for height in heights))
    sheet = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    top = GAP
    for (heading, frames), height in zip(rows, heights, strict=True):
        draw.text((GAP, top + LINE_HEIGHT / 2), heading, fill=INK, font=font, anchor="lm")
        for i, (caption, frame) in enumerate(frames):
            left = GAP + i * (cell + GAP)
            sheet.paste(frame.resize((cell, height), Image.Resampling.LANCZOS), (left, top + LINE_HEIGHT))
            middle = left + cell / 2, top + LINE_HEIGHT + height + LINE_HEIGHT / 2
            draw.text(middle, caption, fill=INK, font=font, anchor="mm")
        top += height + 2 * LINE_HEIGHT + GAP
    return sheet


def overlay_masks(frame: Image.Image, labels_HW: np.ndarray) -> Image.Image:
    """A frame with tinted and outlined objects."""
    pixels = np.asarray(frame.convert("RGB")).copy()
    for number in range(1, int(labels_HW.max()) + 1):
        mask, color = labels_HW == number, np.array(COLORS[(number - 1) % len(COLORS)])
        pixels[mask] = (pixels[mask] * 0.45 + color * 0.55).round().astype(np.uint8)
        pixels[mask_border(mask)] = PAPER
    return Image.fromarray(pixels)


def default_palette() -> list[int]:
    """r, g, b of 256 colors: black, then `COLORS` repeated."""
    repeated = [COLORS[i % len(COLORS)] for i in range(255)]
    return [0, 0, 0, *(value for color in repeated for value in color)]
