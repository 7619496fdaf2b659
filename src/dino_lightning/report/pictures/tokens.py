"""Pictures of a network's last tokens: the attention of each head in its own color, and patch tokens.

Images in one sheet may differ in shape. H, W pixels, h, w patches, M attention masses, D width of a token.
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
"""Okabe and Ito's palette for color blindness; with more heads, hues at equal distances are used."""
COMPONENTS = 3
OUTLIERS = 0.01
"""Share of the tokens at either end of a component that is ignored for its scale."""
LEGEND_HEIGHT, LEGEND_WIDTH = 24, 76
"""Size of one head in the legend (pixels)."""


@dataclass(frozen=True)
class AttentionFigure:
    """One image with its attention and tokens."""

    image: Tensor
    """(C, H, W) in 0 to 1."""
    attention: Tensor
    """(heads, h, w)."""
    top_patches: Tensor
    """The patches with the most attention that sum up to each mass: bool (M, heads, h, w)."""
    mask: np.ndarray | None = None
    """The object's pixels, bool (H, W)."""
    tokens: Tensor | None = None
    """(h, w, D)."""


@dataclass(frozen=True)
class TokenColors:
    """Colors of tokens: the first three principal components as red, green and blue in 0 to 1."""

    mean: Tensor
    """(D,)."""
    axes: Tensor
    """(D, 3), with unit length and a positive entry of largest magnitude."""
    low: Tensor
    high: Tensor
    """(3,): the values that are mapped to 0 and 1."""

    @classmethod
    def fit(cls, tokens: Sequence[Tensor]) -> "TokenColors":
        """Fit the components to the tokens (h, w, D) of images that are shown together."""
        tokens_ND = torch.cat([each.detach().double().cpu().flatten(0, 1) for each in tokens])
        mean_D = tokens_ND.mean(0)
        _, vectors_DD = torch.linalg.eigh((tokens_ND - mean_D).T.cov(correction=0))
        axes_D3 = vectors_DD.flip(-1)[:, :COMPONENTS]
        # The sign of an eigenvector is arbitrary and differs between libraries.
        largest_13 = axes_D3.gather(0, axes_D3.abs().argmax(0, keepdim=True))
        axes_D3 = axes_D3 * largest_13.sign()
        values_N3 = (tokens_ND - mean_D) @ axes_D3
        low_3, high_3 = (torch.quantile(values_N3, share, dim=0) for share in (OUTLIERS, 1 - OUTLIERS))
        return cls(mean_D, axes_D3, low_3, high_3)

    def __call__(self, tokens_hwD: Tensor) -> Tensor:
        """Clipped colors (3, h, w) in 0 to 1; 0.5 for constant components."""
        values_hw3 = (tokens_hwD.detach().double().cpu() - self.mean) @ self.axes
        width_3 = self.high - self.low
        scaled = torch.where(width_3 > 1e-9, (values_hw3 - self.low) / width_3.clamp(min=1e-9), 0.5)
        return scaled.clamp(0, 1).permute(2, 0, 1).float()


def attention_figure_sheet(figures: Sequence[AttentionFigure], *, cell: int = 128) -> Image.Image:
    """`attention_sheet` for figures."""
    images, attention = [each.image for each in figures], [each.attention for each in figures]
    return attention_sheet(images, attention, [each.mask for each in figures], cell=cell)


def heads_sheet(
    figures: Sequence[AttentionFigure], *, masses: Sequence[float], colors: TokenColors | None = None, cell: int = 256
) -> Image.Image:
    """One row per image: the image, and for each mass the heads' masks in their colors on top of it.

    A legend shows the colors of the heads. With `colors`, the patch tokens are added at the right.
    """
    rows = []
    for each in figures:
        picture = to_picture(each.image, width=cell)
        rows.append([picture, *(color_heads(each, mass=m, size=picture.size) for m in range(len(masses)))])
        if colors is not None:
            rows[-1].append(_token_picture(each.tokens, colors, size=picture.size))
    titles = ["image", *(f"{mass:.0%} of the attention" for mass in masses), *["patch tokens"] * (colors is not None)]
    sheet = grid_sheet(rows, titles=titles, width=cell)
    return stack([sheet, _head_legend(figures[0].attention.shape[0], width=sheet.width)])


def patch_sheet(
    images_BCHW: Tensor | Sequence[Tensor], tokens_BhwD: Tensor | Sequence[Tensor], *, per_row: int = 4, cell: int = 128
) -> Image.Image:
    """Images, RGB in 0 to 1, next to their patch tokens in color, with `per_row` such pairs per row.

    Images of different shapes are passed as lists. `cell` is the width of a panel in pixels.
    """
    colors = TokenColors.fit(list(tokens_BhwD))
    panels = []
    for image, tokens in zip(images_BCHW, tokens_BhwD, strict=True):
        picture = to_picture(image, width=cell)
        panels += [picture, _token_picture(tokens, colors, size=picture.size)]
    columns = 2 * min(per_row, len(images_BCHW))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    return grid_sheet(rows, titles=["image", "patch tokens"] * (columns // 2), width=cell)


def clip_frame(figure: AttentionFigure, colors: TokenColors | None, *, width: int) -> Image.Image:
    """Side by side: the frame, the mean attention, the heads' first mass in color, and with `colors` the tokens.

    Each panel is `width` pixels wide.
    """
    picture = to_picture(figure.image, width=width)
    mean = blend_map(np.asarray(picture), rescale_map(figure.attention.mean(0), picture.size))
    panels = [picture, Image.fromarray(mean), color_heads(figure, mass=0, size=picture.size)]
    if colors is not None:
        panels.append(_token_picture(figure.tokens, colors, size=picture.size))
    frame = Image.new("RGB", (len(panels) * width, picture.height))
    for i, panel in enumerate(panels):
        frame.paste(panel, (i * width, 0))
    return frame


def color_heads(figure: AttentionFigure, *, mass: int, size: tuple[int, int]) -> Image.Image:
    """The masks of one mass, in the heads' colors on top of the gray image, at `size` = (width, height).

    More attention gives a stronger color. A patch in several masks gets the color of the head with the most attention,
    relative to the head's maximum, because mixed colors would belong to no head. The object, if any, is outlined.
    """
    attention, top_patches = figure.attention.detach().float().cpu(), figure.top_patches[mass].cpu()
    strongest = attention.amax((-2, -1), keepdim=True).clamp(min=1e-12)
    # At least 0.4, so that the rim of a mask is visible.
    strength_hw, head_hw = (top_patches * (0.4 + 0.6 * attention / strongest)).max(0)
    color_hw3 = np.array(head_colors(len(attention)))[head_hw.numpy()]
    alpha_hw = 0.8 * strength_hw.numpy()
    tint, alpha = (_enlarged(values, size) for values in (color_hw3, alpha_hw))
    gray = np.asarray(to_picture(figure.image).resize(size, Image.Resampling.LANCZOS).convert("L"))[..., None]
    pixels = (gray * (1 - alpha[..., None]) + tint * alpha[..., None]).round().astype(np.uint8)
    return Image.fromarray(pixels if figure.mask is None else draw_outline(pixels, figure.mask))


def head_colors(heads: int) -> list[Color]:
    """A color for each head."""
    if heads <= len(HEAD_COLORS):
        return HEAD_COLORS[:heads]
    hues = [colorsys.hls_to_rgb(i / heads, 0.45 + 0.2 * (i % 2), 0.9) for i in range(heads)]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in hues]


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Stack sheets vertically."""
    width, height = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
    page, top = Image.new("RGB", (width, height), PAPER), 0
    for sheet in sheets:
        page.paste(sheet, (0, top))
        top += sheet.height
    return page


def _head_legend(heads: int, *, width: int) -> Image.Image:
    per_line = max(1, (width - GAP) // LEGEND_WIDTH)
    key = Image.new("RGB", (width, LEGEND_HEIGHT * math.ceil(heads / per_line)), PAPER)
    draw, font = ImageDraw.Draw(key), ImageFont.load_default(size=13)
    for i, color in enumerate(head_colors(heads)):
        left, top = GAP + i % per_line * LEGEND_WIDTH, i // per_line * LEGEND_HEIGHT
        draw.rectangle((left, top + 5, left + 13, top + 18), fill=color)
        draw.text((left + 18, top + LEGEND_HEIGHT / 2), f"head {i + 1}", fill=INK, font=font, anchor="lm")
    return key


def _token_picture(tokens_hwD: Tensor | None, colors: TokenColors, *, size: tuple[int, int]) -> Image.Image:
    assert tokens_hwD is not None, "there are no tokens"
    return to_picture(colors(tokens_hwD)).resize(size, Image.Resampling.NEAREST)


def _enlarged(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) or (h, w, 3) enlarged to (width, height), with each patch as a rectangle and sharp edges."""
    columns, rows = (np.arange(n) * part // n for n, part in zip(size, values.shape[1::-1], strict=True))
    return values[rows][:, columns]
