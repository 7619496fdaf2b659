"""Pictures of what a network's last tokens know: each head's attention in a color of its own, and patch tokens.

Images of one sheet may differ in shape. H, W pixels, h, w patches, M masses, D width of a token.
"""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dino_lightning.report.pictures.sheets import (
    GAP,
    INK,
    PAPER,
    Color,
    attention_sheet,
    blend_map,
    draw_outline,
    grid_sheet,
    rescale_map,
    to_picture,
)

HEAD_COLORS: list[Color] = [
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
]
"""Okabe and Ito's, told apart under color blindness; more heads than these take hues at equal distances."""
COMPONENTS = 3
OUTLIERS = 0.01
"""Share of the tokens at either end of a component that do not stretch its scale."""
KEY, KEY_WIDTH = 24, 76
"""Height of a line that names the heads' colors, and width of a head in it (pixels)."""


@dataclass(frozen=True)
class AttentionFigure:
    """One image and what is drawn of it."""

    image: Tensor
    """(C, H, W) in 0 to 1."""
    attention: Tensor
    """(heads, h, w)."""
    top_patches: Tensor
    """Which patches make up each mass: bool (M, heads, h, w)."""
    mask: np.ndarray | None = None
    """The object's pixels, bool (H, W)."""
    tokens: Tensor | None = None
    """(h, w, D)."""


@dataclass(frozen=True)
class TokenColors:
    """A red, a green and a blue for tokens: their first three principal components, each from 0 to 1."""

    mean: Tensor
    """(D,)."""
    axes: Tensor
    """(D, 3), of unit length; the entry of the largest size is positive."""
    low: Tensor
    high: Tensor
    """(3,): what becomes 0 and 1."""

    @classmethod
    def fit(cls, tokens: Sequence[Tensor]) -> "TokenColors":
        """Of the tokens (h, w, D) of images that are shown together."""
        tokens_ND = torch.cat([each.detach().double().cpu().flatten(0, 1) for each in tokens])
        mean_D = tokens_ND.mean(0)
        _, vectors_DD = torch.linalg.eigh((tokens_ND - mean_D).T.cov(correction=0))
        axes_D3 = vectors_DD.flip(-1)[:, :COMPONENTS]
        # An eigenvector's sign is arbitrary, and would differ from library to library.
        largest_13 = axes_D3.gather(0, axes_D3.abs().argmax(0, keepdim=True))
        axes_D3 = axes_D3 * largest_13.sign()
        values_N3 = (tokens_ND - mean_D) @ axes_D3
        low_3, high_3 = (torch.quantile(values_N3, share, dim=0) for share in (OUTLIERS, 1 - OUTLIERS))
        return cls(mean_D, axes_D3, low_3, high_3)

    def __call__(self, tokens_hwD: Tensor) -> Tensor:
        """Colors (3, h, w) in 0 to 1, values beyond the scale cut off; 0.5 where a component is constant."""
        values_hw3 = (tokens_hwD.detach().double().cpu() - self.mean) @ self.axes
        width_3 = self.high - self.low
        scaled = torch.where(width_3 > 1e-9, (values_hw3 - self.low) / width_3.clamp(min=1e-9), 0.5)
        return scaled.clamp(0, 1).permute(2, 0, 1).float()


def attention_figure_sheet(shown: Sequence[AttentionFigure], *, cell: int = 128) -> Image.Image:
    """`attention_sheet` of images that may differ in shape."""
    sheets = []
    for each in shown:
        masks = None if each.mask is None else [each.mask]
        sheets.append(attention_sheet(each.image[None], each.attention[None], masks, cell=cell))
    return _stack_rows(sheets, heights=[_height(each, cell) for each in shown])


def heads_sheet(
    shown: Sequence[AttentionFigure], *, masses: Sequence[float], colors: TokenColors | None = None, cell: int = 256
) -> Image.Image:
    """One row per image: the picture, and for each mass the heads' masks in their colors over it.

    Below stands which color is whose. With `colors`, the patch tokens follow at the right.
    """
    sheets = []
    for each in shown:
        size = (cell, _height(each, cell))
        picture = to_picture(each.image).resize(size, Image.Resampling.LANCZOS)
        row = [picture, *(color_heads(each, mass=m, size=size) for m in range(len(masses)))]
        titles = ["image", *(f"{mass:.0%} of the attention" for mass in masses)]
        if colors is not None:
            row.append(_token_picture(each, colors, size=size))
            titles.append("patch tokens")
        sheets.append(grid_sheet([row], titles=titles, size=size))
    sheet = _stack_rows(sheets, heights=[_height(each, cell) for each in shown])
    return stack([sheet, _head_legend(shown[0].attention.shape[0], width=sheet.width)])


def token_sheet(
    shown: Sequence[AttentionFigure], colors: TokenColors, *, per_row: int = 2, cell: int = 192
) -> Image.Image:
    """Each image beside its patch tokens in color, `per_row` such pairs beside each other."""
    rows = []
    for start in range(0, len(shown), per_row):
        some = shown[start : start + per_row]
        size = (cell, max(_height(each, cell) for each in some))
        row = []
        for each in some:
            own = (cell, _height(each, cell))
            row += [
                to_picture(each.image).resize(own, Image.Resampling.LANCZOS),
                _token_picture(each, colors, size=own),
            ]
        rows.append((row, size))
    pairs = min(per_row, len(shown))
    sheets = [grid_sheet([row], titles=["image", "patch tokens"] * pairs, size=size) for row, size in rows]
    return _stack_rows(sheets, heights=[size[1] for _, size in rows])


def patch_sheet(images_BCHW: Tensor, tokens_BhwD: Tensor, *, per_row: int = 4, cell: int = 128) -> Image.Image:
    """Images of one shape, RGB in 0 to 1, each beside its patch tokens in color; `per_row` such pairs in a row."""
    size = (cell, max(1, round(cell * images_BCHW.shape[-2] / images_BCHW.shape[-1])))
    colors = TokenColors.fit(list(tokens_BhwD))
    pairs = []
    for image, tokens in zip(images_BCHW, tokens_BhwD, strict=True):
        pairs.append(to_picture(image).resize(size, Image.Resampling.LANCZOS))
        pairs.append(to_picture(colors(tokens)).resize(size, Image.Resampling.NEAREST))
    columns = 2 * min(per_row, len(images_BCHW))
    rows = [pairs[start : start + columns] for start in range(0, len(pairs), columns)]
    return grid_sheet(rows, titles=["image", "patch tokens"] * (columns // 2), size=size)


def clip_frame(shown: AttentionFigure, colors: TokenColors | None, *, width: int) -> Image.Image:
    """Side by side: the frame, the mean attention, the heads' first mass in color, and with `colors` the tokens.

    Each is `width` pixels wide.
    """
    size = (width, _height(shown, width))
    picture = to_picture(shown.image).resize(size, Image.Resampling.LANCZOS)
    mean = blend_map(np.asarray(picture), rescale_map(shown.attention.mean(0), size))
    panels = [picture, Image.fromarray(mean), color_heads(shown, mass=0, size=size)]
    if colors is not None:
        panels.append(_token_picture(shown, colors, size=size))
    frame = Image.new("RGB", (len(panels) * width, size[1]))
    for i, panel in enumerate(panels):
        frame.paste(panel, (i * width, 0))
    return frame


def color_heads(shown: AttentionFigure, *, mass: int, size: tuple[int, int]) -> Image.Image:
    """The masks of one mass, each head's in its color over the picture in gray, at `size` = (width, height).

    The more attention a patch has in its head the stronger is the color. Where heads meet, the patch belongs to the
    one that thinks most of it, measured by the head's own strongest patch: mixed colors would be nobody's. The object,
    where there is one, is outlined.
    """
    attention, kept = shown.attention.detach().float().cpu(), shown.top_patches[mass].cpu()
    strongest = attention.amax((-2, -1), keepdim=True).clamp(min=1e-12)
    # From the weakest kept patch on: a mask's rim should be seen, too.
    strength_hw, head_hw = (kept * (0.4 + 0.6 * attention / strongest)).max(0)
    color_hw3 = np.array(head_colors(len(attention)))[head_hw.numpy()]
    alpha_hw = 0.8 * strength_hw.numpy()
    tint, alpha = (_enlarged(values, size) for values in (color_hw3, alpha_hw))
    gray = np.asarray(to_picture(shown.image).resize(size, Image.Resampling.LANCZOS).convert("L"))[..., None]
    pixels = (gray * (1 - alpha[..., None]) + tint * alpha[..., None]).round().astype(np.uint8)
    return Image.fromarray(pixels if shown.mask is None else draw_outline(pixels, shown.mask))


def head_colors(heads: int) -> list[Color]:
    """A color for each head."""
    if heads <= len(HEAD_COLORS):
        return HEAD_COLORS[:heads]
    hues = [colorsys.hls_to_rgb(i / heads, 0.45 + 0.2 * (i % 2), 0.9) for i in range(heads)]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in hues]


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets below each other."""
    width, height = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
    page, top = Image.new("RGB", (width, height), PAPER), 0
    for sheet in sheets:
        page.paste(sheet, (0, top))
        top += sheet.height
    return page


def _stack_rows(sheets: Sequence[Image.Image], *, heights: Sequence[int]) -> Image.Image:
    """Sheets of one row each, panels of `heights`, as one: only the first keeps its titles."""
    cut = [
        sheet.crop((0, sheet.height - height - GAP, sheet.width, sheet.height))
        for sheet, height in zip(sheets[1:], heights[1:], strict=True)
    ]
    return stack([sheets[0], *cut])


def _head_legend(heads: int, *, width: int) -> Image.Image:
    per_line = max(1, (width - GAP) // KEY_WIDTH)
    key = Image.new("RGB", (width, KEY * math.ceil(heads / per_line)), PAPER)
    draw, font = ImageDraw.Draw(key), ImageFont.load_default(size=13)
    for i, color in enumerate(head_colors(heads)):
        left, top = GAP + i % per_line * KEY_WIDTH, i // per_line * KEY
        draw.rectangle((left, top + 5, left + 13, top + 18), fill=color)
        draw.text((left + 18, top + KEY / 2), f"head {i + 1}", fill=INK, font=font, anchor="lm")
    return key


def _token_picture(shown: AttentionFigure, colors: TokenColors, *, size: tuple[int, int]) -> Image.Image:
    assert shown.tokens is not None, "nothing to color"
    return to_picture(colors(shown.tokens)).resize(size, Image.Resampling.NEAREST)


def _enlarged(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) or (h, w, 3) at (width, height), each patch a rectangle: a mask's edges are where it has them."""
    columns, rows = (np.arange(n) * part // n for n, part in zip(size, values.shape[1::-1], strict=True))
    return values[rows][:, columns]


def _height(shown: AttentionFigure, width: int) -> int:
    """The rows of a picture that is `width` pixels wide."""
    return max(1, round(width * shown.image.shape[-2] / shown.image.shape[-1]))
