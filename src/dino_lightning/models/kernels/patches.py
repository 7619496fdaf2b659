"""The patch embedding of several views as one matrix product, for GPUs.

A convolution whose kernel is as large as its stride is a linear layer over patches. As convolutions, the views of a
batch take about 70 small kernels with a layout change each; as rows of one matrix they take one copy each, which also
casts them, and one product. The copy is saved for the gradient instead of the images: half their size under autocast.

B images of a view, C channels, p side of a patch, P patches in all, D width.
"""

from itertools import groupby
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dino_lightning.runtime.precision import autocast_dtype


def available(views: list[Tensor], embed: Any) -> bool:
    """Whether timm's `embed` is such a convolution, and the images are on a GPU and divisible into patches."""
    conv = embed.proj
    is_linear = isinstance(conv, nn.Conv2d) and conv.kernel_size == conv.stride and conv.padding == (0, 0)
    if not is_linear or conv.groups != 1 or not isinstance(embed.norm, nn.Identity):
        return False
    p, q = conv.kernel_size
    return all(view.is_cuda and view.shape[2] % p == 0 and view.shape[3] % q == 0 for view in views)


def embed_patches(views: list[Tensor], conv: nn.Conv2d) -> list[Tensor]:
    """Patches (B, h, w, D) of each run of views (B, C, H, W) of one size, joined into one batch."""
    p, q = conv.kernel_size
    grids = [(len(view), view.shape[2] // p, view.shape[3] // q) for view in views]
    counts = [B * h * w for B, h, w in grids]
    rows_PI = views[0].new_empty(sum(counts), conv.in_channels * p * q, dtype=autocast_dtype(views[0]))
    for view_BCHW, part_PI, (B, h, w) in zip(views, rows_PI.split(counts), grids, strict=True):
        cells_BhwCpq = view_BCHW.unflatten(3, (w, q)).unflatten(2, (h, p)).permute(0, 2, 4, 1, 3, 5)
        part_PI.view(B, h, w, conv.in_channels, p, q).copy_(cells_BhwCpq)
    patches_PD = F.linear(rows_PI, conv.weight.flatten(1), conv.bias)
    runs = [(sum(B for B, _, _ in run), *size) for size, run in groupby(grids, key=lambda grid: grid[1:])]
    parts = patches_PD.split([B * h * w for B, h, w in runs])
    return [part.unflatten(0, run) for part, run in zip(parts, runs, strict=True)]
