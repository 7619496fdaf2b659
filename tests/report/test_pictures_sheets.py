"""Sheets of pictures: their layout and colors, read from their pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from dino_lightning.report.pictures.sheets import (
    AGREES,
    DIFFERS,
    GAP,
    PAPER,
    attention_sheet,
    color_map,
    crop_sheet,
    mask_border,
    neighbor_sheet,
)


def panel(sheet: Image.Image, *, row: int, column: int, cell: tuple[int, int], rows: int) -> np.ndarray:
    """The pixels of one panel of a sheet without a split: panels are at the bottom, titles above them."""
    width, height = cell
    left = GAP + column * (width + GAP)
    top = sheet.height - (rows - row) * (height + GAP)
    return np.asarray(sheet.crop((left, top, left + width, top + height)))


def lightness(colors: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB colors (..., 3) in 0 to 255."""
    encoded = colors / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(luminance > 216 / 24389, 116 * np.cbrt(luminance) - 16, luminance * 24389 / 27)


def test_color_map_grows_lighter_in_even_steps():
    steps = np.diff(lightness(color_map(np.linspace(0, 1, 11))))
    assert steps.min() > 5
    assert steps.max() < 15


def test_attention_sheet_has_image_mean_and_at_most_six_heads():
    images = torch.rand(2, 3, 24, 24)
    for heads, columns in [(1, 3), (6, 8), (12, 8)]:
        sheet = attention_sheet(images, torch.rand(2, heads, 4, 4), cell=32)
        assert sheet.width == GAP + columns * (32 + GAP)


def test_attention_is_bright_where_it_is_high():
    attention = torch.zeros(1, 2, 4, 4)
    attention[0, 0, 0, 3] = 0.01  # tiny, yet the largest of its map
    attention[0, 1, 3, 0] = 0.9
    sheet = attention_sheet(torch.zeros(1, 3, 16, 16), attention, cell=64)
    first, second = (panel(sheet, row=0, column=c, cell=(64, 64), rows=1).astype(int).sum(-1) for c in (2, 3))
    for head, (bright, dark) in zip((first, second), [((2, 61), (61, 2)), ((61, 2), (2, 61))], strict=True):
        assert head[bright] == head.max()
        assert head[dark] == head.min()


def test_mean_is_over_all_heads_also_those_not_shown():
    attention = torch.zeros(1, 8, 2, 2)
    attention[0, 7, 1, 1] = 1.0
    sheet = attention_sheet(torch.zeros(1, 3, 8, 8), attention, cell=32)
    mean = panel(sheet, row=0, column=1, cell=(32, 32), rows=1).astype(int).sum(-1)
    assert mean[-1, -1] == mean.max() > mean[0, 0]


def test_constant_attention_is_dark_and_not_noise():
    sheet = attention_sheet(torch.zeros(1, 3, 8, 8), torch.full((1, 1, 4, 4), 1 / 16), cell=32)
    assert (panel(sheet, row=0, column=2, cell=(32, 32), rows=1) == color_map(np.zeros(()))).all()


def test_image_keeps_its_pixels_and_shape():
    image = torch.rand(1, 3, 24, 48)
    sheet = attention_sheet(image, torch.rand(1, 1, 3, 6), cell=48)
    shown = panel(sheet, row=0, column=0, cell=(48, 24), rows=1)
    assert (shown == (image[0] * 255).round().byte().permute(1, 2, 0).numpy()).all()


def test_mask_is_outlined_on_the_maps_but_not_on_the_image():
    mask = np.zeros((32, 32), bool)
    mask[8:24, 8:24] = True
    plain, outlined = (
        attention_sheet(torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 4, 4), masks, cell=32) for masks in (None, [mask])
    )
    image, head = (panel(outlined, row=0, column=c, cell=(32, 32), rows=1) for c in (0, 2))
    assert (image == panel(plain, row=0, column=0, cell=(32, 32), rows=1)).all()
    assert ((head == PAPER).all(-1) == mask_border(mask)).all()


def test_outline_by_a_loop():
    mask = np.random.default_rng(0).random((9, 7)) < 0.6
    expected = np.zeros_like(mask)
    for y, x in np.argwhere(mask):
        around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        expected[y, x] = any(not mask[j, i] for j, i in around if 0 <= j < 9 and 0 <= i < 7)
    assert (mask_border(mask) == expected).all()


def test_masks_must_be_one_per_image():
    with pytest.raises(ValueError, match="shorter"):
        attention_sheet(torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 2, 2), [np.ones((8, 8), bool)])


def has(sheet: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    return (np.asarray(sheet) == color).all(-1)


def test_frames_say_whether_labels_agree():
    gray = Image.new("RGB", (10, 10), (128, 128, 128))
    sheet = neighbor_sheet([gray], [[gray, gray]], query_labels=["owl"], neighbor_labels=[["owl", "bee"]], cell=64)
    agrees, differs = np.argwhere(has(sheet, AGREES))[:, 1], np.argwhere(has(sheet, DIFFERS))[:, 1]
    assert agrees.max() < differs.min()
    # In gray, the white signs on them still differ.
    signs = []
    for color, columns in ((AGREES, agrees), (DIFFERS, differs)):
        right, bottom = columns.max() + 1, np.argwhere(has(sheet, color))[:, 0].max() + 1
        signs.append(has(sheet, PAPER)[bottom - 12 : bottom, right - 12 : right])
    assert all(sign.any() for sign in signs)
    assert (signs[0] != signs[1]).any()


def test_without_labels_there_are_no_frames_and_no_text():
    gray = Image.new("L", (10, 20), 128)
    sheet = neighbor_sheet([gray, gray], [[gray] * 3, [gray]], cell=64)
    assert not has(sheet, AGREES).any()
    assert not has(sheet, DIFFERS).any()
    labeled = neighbor_sheet(
        [gray, gray], [[gray] * 3, [gray]], query_labels=["a", "b"], neighbor_labels=[["a"] * 3, ["a"]], cell=64
    )
    assert labeled.width == sheet.width
    assert labeled.height > sheet.height


def test_long_labels_stay_below_their_picture():
    black = Image.new("RGB", (8, 8))
    names = ["a label far too long for the width of a picture", "", "two\nlines"]
    sheet = neighbor_sheet([black], [[black, black]], query_labels=names[:1], neighbor_labels=[names[1:]], cell=48)
    gap = np.asarray(sheet)[:, GAP + 48 : GAP + 48 + GAP]
    assert (gap == PAPER).all()


def test_crops_are_denormalized_and_at_one_scale():
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    expected = (230, 26, 153)
    color = torch.tensor(expected) / 255
    normalized = ((color - torch.tensor(mean)) / torch.tensor(std))[:, None, None]
    crops = [normalized.expand(3, 32, 32), normalized.expand(3, 16, 16)] * 2
    sheet = crop_sheet(crops, mean, std, per_row=2, cell=64)
    for row in (0, 1):
        large, small = (panel(sheet, row=row, column=c, cell=(64, 64), rows=2) for c in (0, 1))
        assert (large == expected).all()
        assert (small == expected).all(-1).sum() == 32 * 32
        assert (small[16:48, 16:48] == expected).all()
