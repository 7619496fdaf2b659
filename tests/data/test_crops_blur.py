"""The blur against its equations, a slow loop over pixels and PIL's."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from crop_cases import noise, picture, pixels, smooth
from PIL import Image, ImageFilter
from torch import Tensor

from dino_lightning.data.crops import numba as compiled
from dino_lightning.data.crops.blur import blur, box_matrices, box_weights, padded_weights

SIGMAS = [0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.3, math.sqrt(2), 1.42, 1.7, 2.0, 3.0, 5.0]
"""The usual ones from 0.1 to 2, the step to a box of three whole pixels at the root of 2, and stronger ones."""


def _weights(*sigmas: float) -> Tensor:
    return torch.tensor(padded_weights(sigmas))


def _by_matrices(images_NCHW: Tensor, *sigmas: float) -> Tensor:
    return blur(images_NCHW, _weights(*sigmas))


def _by_loops(images_NCHW: Tensor, *sigmas: float) -> Tensor:
    out = images_NCHW.clone()
    for image, sigma in zip(out, sigmas, strict=True):
        box = np.array(box_weights(sigma), np.float32)
        compiled._blur_rows(image.numpy(), box)
        compiled._blur_columns(image.numpy(), box)
    return out


BOTH = pytest.mark.parametrize("blurred", [_by_matrices, _by_loops])
EXACT = 2e-3
"""Float32 sums of values up to 255 (1/255)."""


def _slow_box(row: list[float], sigma: float) -> list[float]:
    """A box of radius l + a along a row: 2 l + 1 whole pixels and a share of the next ones, the edge pixel going on."""
    inner, share = box_weights(sigma)[0], box_weights(sigma)[-1]
    whole, last = len(box_weights(sigma)) - 2, len(row) - 1
    out = []
    for i in range(len(row)):
        total = sum(row[min(max(i + d, 0), last)] for d in range(-whole, whole + 1)) * inner
        out.append(total + share * (row[max(i - whole - 1, 0)] + row[min(i + whole + 1, last)]))
    return out


def _slow(image_HW: Tensor, sigma: float) -> Tensor:
    """Three boxes along each row, then three along each column."""
    x = image_HW.double()
    for _ in range(2):
        for _ in range(3):
            x = torch.tensor([_slow_box(row, sigma) for row in x.tolist()], dtype=torch.float64)
        x = x.T
    return x


# ------------------------------------------------------------------------------------------------------- equations


@pytest.mark.parametrize("sigma", SIGMAS)
def test_three_boxes_have_the_variance_of_the_gaussian(sigma: float) -> None:
    """Weights sum to 1; all are equal but the outermost, which are a share of the others: that defines them."""
    weights = box_weights(sigma)
    assert weights[0] + 2 * sum(weights[1:]) == pytest.approx(1, abs=1e-12)
    assert 2 * sum(w * d**2 for d, w in enumerate(weights)) == pytest.approx(sigma**2 / 3, abs=1e-12)
    assert len(set(weights[:-1])) == 1
    assert 0 <= weights[-1] <= weights[0] * (1 + 1e-12)


def test_the_kernel_is_close_to_the_gaussian() -> None:
    """Far from the edges; within a tenth of its peak, and of the same variance."""
    for sigma in (1.5, 2.0, 5.0):
        row = box_matrices(_weights(sigma), size=101)[0, 50]
        distances = torch.arange(-50, 51)
        gaussian = torch.exp(-(distances**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
        assert (row - gaussian).abs().max() < gaussian.max() / 10
        assert (row * distances**2).sum().item() == pytest.approx(sigma**2, rel=1e-4)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_matrices_are_three_boxes_with_the_edges_held(size: int, sigma: float) -> None:
    """Also where the boxes are wider than the image."""
    matrix = box_matrices(_weights(sigma), size=size)[0]
    for i in range(size):
        row = [float(j == i) for j in range(size)]
        for _ in range(3):
            row = _slow_box(row, sigma)
        torch.testing.assert_close(matrix[:, i], torch.tensor(row), rtol=0, atol=1e-5)
    torch.testing.assert_close(matrix.sum(1), torch.ones(size), rtol=0, atol=1e-5)


def test_zeros_after_the_weights_change_nothing() -> None:
    alone, padded = box_matrices(_weights(0.5), size=12)[0], box_matrices(_weights(0.5, 4.0), size=12)[0]
    torch.testing.assert_close(alone, padded, rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- images


@BOTH
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("size", [(40, 32), (26, 61), (7, 60), (60, 7), (4, 4), (1, 5), (1, 1)])
def test_blur_equals_the_slow_loop(size: tuple[int, int], sigma: float, blurred: Callable[..., Tensor]) -> None:
    """Large, narrow and tiny images of black and white pixels."""
    image = torch.randint(0, 2, size, generator=torch.Generator().manual_seed(0)) * 255.0
    image[0], image[:, -1] = 255.0, 0.0
    ours = blurred(image[None, None], sigma)[0, 0]
    assert (ours - _slow(image, sigma)).abs().max() <= EXACT


@BOTH
@pytest.mark.parametrize("sigma", SIGMAS)
def test_blur_equals_pil(sigma: float, blurred: Callable[..., Tensor]) -> None:
    """Within 3.3 for a pixel and 1.15 on the average (1/255): PIL rounds after each of six boxes."""
    for image in (smooth(96, 64), picture(60, 90), noise(64, 64), noise(9, 14)):
        theirs = pixels(image.filter(ImageFilter.GaussianBlur(sigma))).float()
        difference = (blurred(pixels(image)[None].float(), sigma)[0] - theirs).abs()
        assert difference.max() <= 3.3
        assert difference.mean() <= 1.15


@BOTH
def test_blur_of_a_dot_equals_pil(blurred: Callable[..., Tensor]) -> None:
    """In the middle, near an edge and in a corner."""
    for place in ((16, 16), (1, 14), (0, 31)):
        dot = Image.new("RGB", (32, 32))
        dot.putpixel(place, (255, 128, 255))
        theirs = pixels(dot.filter(ImageFilter.GaussianBlur(1.6))).float()
        ours = blurred(pixels(dot)[None].float(), 1.6)[0]
        assert theirs.max() > 12
        assert (ours - theirs).abs().max() <= 1.5


@BOTH
@pytest.mark.parametrize("size", [(48, 70), (12, 12)])
def test_a_batch_is_blurred_like_single_images(size: tuple[int, int], blurred: Callable[..., Tensor]) -> None:
    order = (0.1, 0.4, 2.0, 1.0, 3.0, 0.45)
    images = torch.randint(0, 256, (len(order), 3, *size), generator=torch.Generator().manual_seed(0)).float()
    before = images.clone()
    together = blurred(images, *order)
    assert torch.equal(images, before)
    for i, sigma in enumerate(order):
        assert (together[i] - blurred(images[i : i + 1], sigma)[0]).abs().max() <= EXACT
