"""Heads and patch tokens in color: layout and colors, read from the pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from dino_lightning.report.pictures.sheets import GAP, PAPER
from dino_lightning.report.pictures.tokens import (
    LEGEND_HEIGHT,
    AttentionFigure,
    TokenColors,
    attention_figure_sheet,
    clip_frame,
    color_heads,
    head_colors,
    heads_sheet,
    patch_sheet,
    stack,
)

SIZE = (40, 20)


def shown(*, h: int = 2, w: int = 4, heads: int = 2, seed: int = 0, tokens: bool = True) -> AttentionFigure:
    """A black image of patches of 5 pixels in which nothing is kept."""
    generator = torch.Generator().manual_seed(seed)
    return AttentionFigure(
        torch.zeros(3, 5 * h, 5 * w),
        torch.rand(heads, h, w, generator=generator),
        torch.zeros(2, heads, h, w, dtype=torch.bool),
        tokens=torch.randn(h, w, 6, generator=generator) if tokens else None,
    )


def patch_of(image: Image.Image, row: int, column: int, *, p: int = 10) -> np.ndarray:
    """The pixels of one patch, all alike: (3,)."""
    pixels = np.asarray(image)[row * p : (row + 1) * p, column * p : (column + 1) * p].reshape(-1, 3)
    assert (pixels == pixels[0]).all()
    return pixels[0]


def test_kept_patches_have_their_heads_color_and_others_none():
    each = shown()
    each.top_patches[0, 0, 0, 1] = each.top_patches[0, 1, 1, 3] = True
    each.attention[0, 0, 1], each.attention[1, 1, 3] = 5.0, 7.0  # the largest of each head
    found = color_heads(each, mass=0, size=SIZE)
    colors = np.array(head_colors(2))
    for place, expected in {(0, 1): colors[0] * 0.8, (1, 3): colors[1] * 0.8, (0, 0): 0, (1, 1): 0}.items():
        np.testing.assert_allclose(patch_of(found, *place), expected, atol=1)
    assert not np.asarray(color_heads(each, mass=1, size=SIZE)).any()


def test_more_attention_is_stronger_and_the_weakest_kept_patch_is_seen():
    each = shown(heads=1)
    each.attention[0] = torch.tensor([[0.0, 1.0, 2.0, 4.0], [4.0, 4.0, 4.0, 4.0]])
    each.top_patches[0, 0, 0] = True
    found = color_heads(each, mass=0, size=SIZE)
    reds = [int(patch_of(found, 0, column)[0]) for column in range(4)]
    assert reds == sorted(reds)
    np.testing.assert_allclose(reds, [230 * 0.8 * (0.4 + 0.6 * part) for part in (0, 0.25, 0.5, 1)], atol=1)


def test_shared_patches_have_the_color_of_the_strongest_head():
    each = shown()
    each.top_patches[0, :, 0, 0] = True
    each.attention[:] = 0.01
    each.attention[0, 0, 0], each.attention[0, 1, 1] = 0.5, 1.0
    each.attention[1, 0, 0] = 0.1  # little, but all that this head has
    np.testing.assert_allclose(
        patch_of(color_heads(each, mass=0, size=SIZE), 0, 0), np.array(head_colors(2)[1]) * 0.8, atol=1
    )


def test_object_is_outlined():
    each = shown()
    mask = np.zeros((10, 20), bool)
    mask[2:8, 4:12] = True
    found = np.asarray(
        color_heads(AttentionFigure(each.image, each.attention, each.top_patches, mask=mask), mass=0, size=SIZE)
    )
    assert (found == PAPER).all(-1).any()
    assert not (np.asarray(color_heads(each, mass=0, size=SIZE)) == PAPER).all(-1).any()


@pytest.mark.parametrize("heads", [1, 3, 7, 12, 16])
def test_every_head_has_its_own_color(heads: int):
    colors = np.array(head_colors(heads))
    assert colors.shape == (heads, 3)
    distances = np.abs(colors[:, None] - colors[None]).sum(-1) + 999 * np.eye(heads)
    assert distances.min() > 40


def test_colors_are_the_first_principal_components():
    rng = np.random.default_rng(0)
    data = rng.normal(size=(240, 8)) @ np.diag([9, 5, 3, 1, 0.5, 0.3, 0.2, 0.1]) @ rng.normal(size=(8, 8)) + 4
    tokens = [torch.from_numpy(data[:160]).reshape(16, 10, 8), torch.from_numpy(data[160:]).reshape(8, 10, 8)]
    colors = TokenColors.fit(tokens)
    centerd = data - data.mean(0)
    _, _, axes = np.linalg.svd(centerd, full_matrices=False)  # another way to the same axes
    for i in range(3):
        axis = axes[i] * np.sign(axes[i][np.abs(axes[i]).argmax()])
        values = centerd @ axis
        low, high = np.quantile(values, [0.01, 0.99])
        expected = np.clip((values - low) / (high - low), 0, 1)
        found = torch.cat([colors(each)[i].flatten() for each in tokens]).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert (found.min(), found.max()) == (0, 1)


def test_signs_do_not_depend_on_the_order_of_images():
    first, second = shown(seed=1).tokens, shown(seed=2).tokens
    assert first is not None
    assert second is not None
    one, other = TokenColors.fit([first, second]), TokenColors.fit([second, first])
    torch.testing.assert_close(one.axes, other.axes)
    assert (one.axes.gather(0, one.axes.abs().argmax(0, keepdim=True)) > 0).all()


def test_components_without_spread_are_half():
    tokens = torch.zeros(3, 4, 6)
    tokens[..., 2] = torch.arange(12.0).reshape(3, 4)
    found = TokenColors.fit([tokens])(tokens)
    assert found.shape == (3, 3, 4)
    assert (found[1:] == 0.5).all()
    assert found[0].flatten().diff().min() > 0


def test_rows_of_images_of_different_shapes():
    wide, tall = shown(h=2, w=4), shown(h=4, w=2)
    sheet = attention_figure_sheet([wide, tall], cell=40)
    alone = attention_figure_sheet([wide], cell=40)
    assert sheet.width == alone.width == GAP + 4 * (40 + GAP)  # image, mean and two heads
    assert sheet.height == alone.height + 80 + GAP
    assert np.array_equal(np.asarray(sheet)[: alone.height], np.asarray(alone))


def test_heads_sheet_has_a_column_for_each_mass_and_a_key():
    every = [shown(seed=seed) for seed in range(3)]
    sheet = heads_sheet(every, masses=[0.6, 0.8], cell=60)
    assert sheet.width == GAP + 3 * (60 + GAP)
    key = np.asarray(sheet)[-LEGEND_HEIGHT:]
    for color in head_colors(2):
        assert (key == color).all(-1).sum() > 100
    colors = TokenColors.fit([each.tokens for each in every if each.tokens is not None])
    assert heads_sheet(every, masses=[0.6, 0.8], colors=colors, cell=60).width == GAP + 4 * (60 + GAP)


def test_key_of_many_heads_is_whole():
    every = [shown(heads=16)]
    sheet = heads_sheet(every, masses=[0.6], cell=60)
    for color in head_colors(16):
        assert (np.asarray(sheet) == color).all(-1).sum() > 100


def test_tokens_are_next_to_their_image():
    every = [shown(seed=seed) for seed in range(3)]
    colors = TokenColors.fit([each.tokens for each in every if each.tokens is not None])
    sheet = patch_sheet([each.image for each in every], [each.tokens for each in every], per_row=2, cell=40)
    assert sheet.width == GAP + 4 * (40 + GAP)
    tokens = every[1].tokens
    assert tokens is not None
    left, top = GAP + 3 * (40 + GAP), sheet.height - 2 * (20 + GAP)
    panel = sheet.crop((left, top, left + 40, top + 20))
    expected = colors(tokens)
    for row in range(2):
        for column in range(4):
            np.testing.assert_allclose(patch_of(panel, row, column) / 255, expected[:, row, column].numpy(), atol=0.003)


def test_frame_of_a_clip_has_its_panels_side_by_side():
    each = shown()
    assert each.tokens is not None
    each.top_patches[0, 0] = True
    frame = clip_frame(each, TokenColors.fit([each.tokens]), width=40)
    assert frame.size == (160, 20)
    pixels = np.asarray(frame)
    assert not pixels[:, :40].any()
    assert np.array_equal(pixels[:, 80:120], np.asarray(color_heads(each, mass=0, size=SIZE)))
    assert clip_frame(each, None, width=40).size == (120, 20)


def test_stacked_sheets_have_a_white_background():
    page = stack([Image.new("RGB", (10, 4)), Image.new("RGB", (6, 5))])
    assert page.size == (10, 9)
    assert np.asarray(page)[5, 8].tolist() == list(PAPER)


def test_patches_of_one_kind_have_one_color_over_all_images():
    kinds = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1]], [[1, 0, 1, 0], [0, 0, 0, 0]], [[1, 1, 1, 1], [0, 1, 1, 0]]])
    images = torch.zeros(3, 3, 10, 20)
    images[1] = 0.5
    sheet = np.asarray(patch_sheet(images, torch.eye(2)[kinds] * 3 + 1, per_row=2, cell=40))
    # Two pairs of panels of 40 × 20 in a row, GAP apart; the third image begins a row.
    top = sheet.shape[0] - 2 * (20 + GAP)
    colors = {0: set(), 1: set()}
    for number, kind_hw in enumerate(kinds.tolist()):
        row, left = top + number // 2 * (20 + GAP), GAP + number % 2 * 2 * (40 + GAP)
        assert (sheet[row + 5, left + 5] == int(images[number, 0, 0, 0] * 255 + 0.5)).all()
        tokens = Image.fromarray(sheet[row : row + 20, left + 40 + GAP : left + 40 + GAP + 40])
        for i, j in np.ndindex(2, 4):
            colors[kind_hw[i][j]].add(tuple(patch_of(tokens, i, j).tolist()))
    assert [len(found) for found in colors.values()] == [1, 1]
    assert colors[0] != colors[1]
    assert (sheet[top + 20 + GAP :, 2 * (40 + GAP) + GAP :] == PAPER).all()
