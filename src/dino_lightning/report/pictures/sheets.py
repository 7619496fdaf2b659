"""Contact sheets of attention maps, nearest neighbors and crops, drawn with PIL.

Shapes: B images, C channels, H and W pixels, h and w patches.
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Pixels: TypeAlias = NDArray[np.uint8]
"""(H, W, 3)."""
Color: TypeAlias = tuple[int, int, int]

MAX_HEADS = 6
"""Maximum number of attention heads with their own map; the mean is over all heads."""
GAP = 6
"""Pixels between the cells of a sheet."""
PAPER: Color = (255, 255, 255)
INK: Color = (32, 34, 40)
FAINT: Color = (200, 202, 208)
AGREES: Color = (0, 145, 110)
DIFFERS: Color = (213, 94, 0)
"""Bluish green and vermilion are distinguishable with every common color blindness; a tick and a cross say the same."""
UNJUDGED: Color = (150, 152, 158)
COLORS: dict[bool | None, Color] = {True: AGREES, False: DIFFERS, None: UNJUDGED}

COLOR_MAP_ANCHORS = np.array(
    [(7, 6, 32), (52, 18, 105), (117, 29, 127), (185, 50, 108), (232, 98, 68), (249, 166, 50), (252, 245, 170)]
)
"""Equally spaced colors from dark to bright. Lightness increases monotonically, so the map also works in gray."""


def attention_sheet(
    images_BCHW: Tensor | Sequence[Tensor],
    attention_BHhw: Tensor | Sequence[Tensor],
    masks: Sequence[np.ndarray | None] | None = None,
    *,
    cell: int = 128,
) -> Image.Image:
    """One row per image: the image, the mean over heads blended with it, and up to six heads.

    Images are RGB in 0 to 1; `attention_BHhw` is (B, heads, h, w) and may have any scale, because each map is shown
    from its minimum to its maximum. Images of different shapes are passed as lists. `masks`, boolean and of the images'
    shape, are drawn as outlines on the maps. `cell` is the width of a panel in pixels.
    """
    rows = []
    for image, heads, mask in zip(images_BCHW, attention_BHhw, masks or [None] * len(images_BCHW), strict=True):
        picture = to_picture(image, width=cell)
        mean, *maps = (rescale_map(map_hw, picture.size) for map_hw in (heads.mean(0), *heads[:MAX_HEADS]))
        panels = [blend_map(np.asarray(picture), mean), *map(color_map, maps)]
        if mask is not None:
            panels = [draw_outline(panel, mask) for panel in panels]
        rows.append([picture, *map(Image.fromarray, panels)])
    heads_shown = min(attention_BHhw[0].shape[0], MAX_HEADS)
    return grid_sheet(rows, titles=["image", "mean", *(f"head {i + 1}" for i in range(heads_shown))], width=cell)


def neighbor_sheet(
    queries: Sequence[Image.Image],
    neighbors: Sequence[Sequence[Image.Image]],
    *,
    query_labels: Sequence[str | None] | None = None,
    neighbor_labels: Sequence[Sequence[str | None]] | None = None,
    verdicts: Sequence[Sequence[bool | None]] | None = None,
    cell: int = 96,
) -> Image.Image:
    """One row per query: the image and its nearest neighbors, nearest first.

    Labels are written below the images; a neighbor with the query's label has a green frame and a tick, one with
    another label an orange frame and a cross. None is an unknown label. `verdicts` replace the comparison of labels:
    right, wrong, or None for a gray frame. `cell` is the side of an image in pixels.
    """
    caption = _font_size(cell) + 6 if query_labels or neighbor_labels else 0
    query_labels = query_labels or [None] * len(queries)
    neighbor_labels = neighbor_labels or [[None] * len(of_query) for of_query in neighbors]
    framed = verdicts is not None
    verdicts = verdicts or [
        [None if label is None or other is None else label == other for other in labels]
        for label, labels in zip(query_labels, neighbor_labels, strict=True)
    ]
    rows = []
    for query, label, *of_query in zip(queries, query_labels, neighbors, neighbor_labels, verdicts, strict=True):
        row = [_captioned(query, label, cell=cell, caption=caption)]
        for neighbor, other, agrees in zip(*of_query, strict=True):
            row.append(_captioned(neighbor, other, cell=cell, caption=caption, agrees=agrees, framed=framed))
        rows.append(row)
    most = max((len(row) for row in rows), default=1) - 1
    return grid_sheet(rows, titles=["query", *map(str, range(1, most + 1))], width=cell, split=2 * GAP)


def crop_sheet(
    crops: Sequence[Tensor], mean: Sequence[float], std: Sequence[float], *, per_row: int, cell: int = 112
) -> Image.Image:
    """Crops (C, H, W), normalized by `mean` and `std`, `per_row` in a row.

    All have the same scale, with the largest at `cell` pixels, so that local crops appear smaller.
    """
    largest = max((max(crop.shape[-2:]) for crop in crops), default=1)
    rows = []
    for start in range(0, len(crops), per_row):
        row = []
        for crop in crops[start : start + per_row]:
            H, W = crop.shape[-2:]
            size = (max(1, round(cell * W / largest)), max(1, round(cell * H / largest)))
            picture = to_picture(crop * crop.new_tensor(std)[:, None, None] + crop.new_tensor(mean)[:, None, None])
            panel = Image.new("RGB", (cell, cell), PAPER)
            resized = picture.resize(size, Image.Resampling.LANCZOS)
            panel.paste(resized, ((cell - size[0]) // 2, (cell - size[1]) // 2))
            row.append(panel)
        rows.append(row)
    titles = [f"{max(crop.shape[-2:])} px" for crop in crops[:per_row]]
    return grid_sheet(rows, titles=titles, width=cell)


def to_picture(image_CHW: Tensor, *, width: int | None = None) -> Image.Image:
    """A tensor in 0 to 1 as an image, resized to `width` pixels; other values are clipped.

    A single channel is gray; otherwise the first three channels are red, green and blue.
    """
    C, H, W = image_CHW.shape
    rgb_3HW = image_CHW.expand(3, -1, -1) if C == 1 else F.pad(image_CHW[:3], (0, 0, 0, 0, 0, max(0, 3 - C)))
    pixels = (rgb_3HW.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    picture = Image.fromarray(pixels.numpy())
    if width is None:
        return picture
    return picture.resize((width, max(1, round(width * H / W))), Image.Resampling.LANCZOS)


def color_map(values_HW: np.ndarray) -> Pixels:
    """Values in 0 to 1 as colors (H, W, 3), from near black over purple and orange to pale yellow."""
    positions = np.linspace(0, 1, len(COLOR_MAP_ANCHORS))
    channels = [np.interp(values_HW, positions, COLOR_MAP_ANCHORS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def mask_border(mask_HW: np.ndarray) -> NDArray[np.bool_]:
    """The pixels of a mask with a neighbor outside it; the image's border does not count as outside."""
    padded = np.pad(mask_HW.astype(bool), 1, mode="edge")
    inner = padded[1:-1, :-2] & padded[1:-1, 2:] & padded[:-2, 1:-1] & padded[2:, 1:-1]
    return padded[1:-1, 1:-1] & ~inner


def rescale_map(map_hw: Tensor, size: tuple[int, int]) -> np.ndarray:
    """A map from 0 (its minimum) to 1 (its maximum) at `size` = (width, height) pixels; 0 where it is constant."""
    values = map_hw.detach().float().cpu().numpy()
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return np.asarray(Image.fromarray(scaled.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))


def blend_map(picture: Pixels, values_HW: np.ndarray) -> Pixels:
    """A colored map of values in 0 to 1, blended with an image."""
    # In gray, because the image's colors would look like attention.
    gray = np.asarray(Image.fromarray(picture).convert("L"))[..., None]
    return (gray * 0.45 + color_map(values_HW) * 0.55).round().astype(np.uint8)


def draw_outline(panel: Pixels, mask: np.ndarray) -> Pixels:
    """Draw the outline of a mask in white with a dark rim, which is visible on every color."""
    height, width = panel.shape[:2]
    resized = Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BILINEAR)
    inside = np.asarray(resized) >= 128
    drawn = panel.copy()
    drawn[mask_border(~inside)] = INK
    drawn[mask_border(inside)] = PAPER
    return drawn


def _captioned(
    picture: Image.Image,
    label: str | None,
    *,
    cell: int,
    caption: int,
    agrees: bool | None = None,
    framed: bool = False,
) -> Image.Image:
    panel = Image.new("RGB", (cell, cell + caption), PAPER)
    panel.paste(picture.convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS), (0, 0))
    draw = ImageDraw.Draw(panel)
    if framed or agrees is not None:
        draw.rectangle((0, 0, cell - 1, cell - 1), outline=COLORS[agrees], width=max(2, cell // 32))
    if agrees is not None:
        _badge(draw, agrees=agrees, side=cell // 5, corner=cell)
    if label is not None:
        _draw_centered(draw, label, box=(0, cell + 1, cell, cell + caption), size=_font_size(cell))
    return panel


def _badge(draw: ImageDraw.ImageDraw, *, agrees: bool, side: int, corner: int) -> None:
    """Draw a tick or a cross in the lower right corner; not every font has these characters."""
    left, top = corner - side, corner - side
    draw.rectangle((left, top, corner - 1, corner - 1), fill=AGREES if agrees else DIFFERS)
    tick, cross = (
        [[(0.22, 0.52), (0.42, 0.72), (0.78, 0.28)]],
        [[(0.27, 0.27), (0.73, 0.73)], [(0.73, 0.27), (0.27, 0.73)]],
    )
    for stroke in tick if agrees else cross:
        draw.line([(left + side * x, top + side * y) for x, y in stroke], fill=PAPER, width=max(2, side // 8))


def grid_sheet(
    rows: Sequence[Sequence[Image.Image]], *, titles: Sequence[str], width: int, split: int = 0
) -> Image.Image:
    """Panels of one width in rows under column titles; `split` adds pixels and a line after the first column."""
    top = _font_size(width) + 10
    columns = max(len(titles), 1)
    heights = [max(panel.height for panel in row) for row in rows]
    size = (GAP + columns * (width + GAP) + split, top + sum(height + GAP for height in heights))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    lefts = [GAP + column * (width + GAP) + (split if column else 0) for column in range(columns)]
    for left, title in zip(lefts, titles, strict=False):
        _draw_centered(draw, title, box=(left, 0, left + width, top), size=_font_size(width))
    if split:
        x = GAP + width + (GAP + split) // 2
        draw.line([(x, top), (x, sheet.height - GAP)], fill=FAINT)
    for row, height in zip(rows, heights, strict=True):
        for left, panel in zip(lefts, row, strict=False):
            sheet.paste(panel, (left, top))
        top += height + GAP
    return sheet


def _draw_centered(draw: ImageDraw.ImageDraw, text: str, *, box: tuple[int, int, int, int], size: int) -> None:
    """Draw a text in the middle of a box, cut to its width."""
    font = ImageFont.load_default(size=size)
    left, top, right, bottom = box
    text = " ".join(text.split())
    candidates = [text, *(text[:length].rstrip() + "…" for length in range(len(text) - 1, 0, -1))]
    shown = next((each for each in candidates if draw.textlength(each, font=font) <= right - left), "")
    draw.text(((left + right) / 2, (top + bottom) / 2), shown, fill=INK, font=font, anchor="mm")


def _font_size(width: int) -> int:
    return max(9, min(16, math.ceil(width / 8)))
