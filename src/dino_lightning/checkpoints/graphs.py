"""Exports a network as an ONNX file or a `torch.export` program, and compares the output with the network.

The batch size is dynamic. So are height and width if the network allows it: for a ViT, any multiples of its patch size,
with the position embedding resampled inside the graph like in the original.
"""

import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim

from dino_lightning.errors import UserError
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.models.vit import OriginalViT

TOLERANCE = 1e-4
"""Maximum difference from the network's features, relative to the largest feature if that is above 1.

In float32, another order of summation differs by about 1e-6; another resampling or kernel by 1e-2 and more."""
MAX_SIDE = 8192
"""Largest image side of a graph with dynamic sizes (pixels)."""
MIN_SIDE = 64
"""Smallest image side for networks without patches (pixels); below it, their last feature map has a single pixel, which
takes another code path."""
METADATA_FILE = "dino_lightning.json"
"""Name of the metadata in a `torch.export` file."""

Forward = Callable[[Tensor], Tensor]
"""Images -> features, computed with the exported file."""


Exporter = Callable[[nn.Module, Tensor, dict[int, Any]], Forward]
"""(network, example images, their dynamic dimensions) -> function that computes with the exported file."""


def _write_onnx(
    network: FrozenNetwork, path: Path, module: nn.Module, example: Tensor, shapes: dict[int, Any]
) -> Forward:
    import onnxruntime

    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["features"]}
    program = torch.onnx.export(module, (example,), dynamo=True, dynamic_shapes=(shapes,), verbose=False, **names)
    assert program is not None
    program.model.metadata_props.update({name: json.dumps(value) for name, value in _metadata(network).items()})
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_program(
    network: FrozenNetwork, path: Path, module: nn.Module, example: Tensor, shapes: dict[int, Any]
) -> Forward:
    program = torch.export.export(module, (example,), dynamic_shapes=(shapes,))
    torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(_metadata(network))})
    return cast(Forward, torch.export.load(io.BytesIO(path.read_bytes())).module())


def _metadata(network: FrozenNetwork) -> dict[str, Any]:
    """Image preprocessing and digest of the weights, as plain types."""
    return {name: getattr(network, name) for name in ("mean", "std", "resize", "size", "digest")}


def write_graph(network: FrozenNetwork, path: Path, *, format: str, image_size: int | None) -> str:
    """Write an ONNX file or, with `format="torch"`, a program for `torch.export.load`; describe the images it accepts.

    Input `images` (B, C, H, W), normalized; output `features` (B, D). The metadata contains the image preprocessing.
    Height and width are fixed if `image_size` is given or the network does not allow dynamic ones. Raises `UserError`
    if the network cannot be exported.
    """
    export: Exporter = partial(_write_onnx if format == "onnx" else _write_program, network, path)
    module = _GraphViT(network.backbone).eval() if isinstance(network.backbone, OriginalViT) else network.backbone
    if image_size is None:
        patch = getattr(getattr(network.backbone, "patch_embed", None), "patch_size", 1)
        step = patch if isinstance(patch, int) else patch[0]
        for least in (1,) if step > 1 else sorted({min(network.size, MIN_SIDE), MIN_SIDE}):
            if _export_any_size(network, module, export, step=step, least=least):
                sides = f"in multiples of {step} pixels" if step > 1 else f"of {least} pixels or more"
                return f"images of any number and size, sides {sides}"
        image_size = network.size
    example = _random_images(network, 2, image_size, image_size)
    try:
        with _silenced_exporters():
            forward = export(module, example, {0: Dim("batch", min=1)})
    except OSError:
        raise
    except Exception as error:  # each exporter has its own errors
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"format={format}: {network.name} cannot be exported ({reason}).") from error
    check_same(network, forward, side=image_size, format=format, advice="it is not kept")
    return f"any number of images of {image_size} x {image_size} pixels only"


def _export_any_size(network: FrozenNetwork, module: nn.Module, export: Exporter, *, step: int, least: int) -> bool:
    """Export with dynamic height and width of at least `least * step` pixels; False if the network does not allow it.

    Networks with positions for a single size do not, nor those with a special case for small feature maps.
    """
    sides: list[Any] = [Dim(name, min=least, max=MAX_SIDE // step) for name in ("height", "width")]
    height, width = [step * side for side in sides] if step > 1 else sides
    # Neither square nor the size of the position embedding, so that the graph is not specialized to such images.
    near = max(-(-network.size // step), least)
    example = _random_images(network, 2, step * (near + 2), step * (near + 1))
    try:
        with _silenced_exporters():
            with torch.no_grad():
                module(example)  # fails immediately for networks with a fixed size; the export would fail after minutes
            forward = export(module, example, {0: Dim("batch", min=1), 2: height, 3: width})
        sizes = [(step * near, step * near), (step * (near + 3), step * near), (step * near, step * (near + 4))]
        return _max_difference(network, forward, sizes=sizes) <= TOLERANCE
    except OSError:
        raise
    except Exception:  # size-dependent control flow, or operators that need fixed sizes
        return False


@torch.no_grad()
def _max_difference(network: FrozenNetwork, forward: Forward, *, sizes: list[tuple[int, int]]) -> float:
    """The largest difference from the network's features, for one and for three images of each size.

    It is relative to the largest feature if that is above 1, and infinite for features of another shape.
    """
    differences = []
    for size in sizes:
        for count in (1, 3):
            images = _random_images(network, count, *size)
            expected, actual = network.backbone(images), forward(images)
            if expected.shape != actual.shape:
                return float("inf")
            differences.append((expected - actual).abs().max() / expected.abs().max().clamp(min=1))
    return max(differences).item()


def check_same(network: FrozenNetwork, forward: Forward, *, side: int, format: str, advice: str) -> None:
    """Raise `UserError` if the exported file computes other features for random images of `side` pixels."""
    difference = _max_difference(network, forward, sizes=[(side, side)])
    if not difference <= TOLERANCE:
        raise UserError(
            f"format={format}: the exported {network.name} computes other features (difference {difference:.1e}); "
            f"{advice}."
        )


def _random_images(network: FrozenNetwork, count: int, height: int, width: int) -> Tensor:
    """Random images (count, C, height, width) with a fixed seed."""
    return torch.randn(count, network.channels, height, width, generator=torch.Generator().manual_seed(0))


@contextmanager
def _silenced_exporters() -> Iterator[None]:
    """Suppress warnings and log messages of the exporters, which report their own passes."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)


class _GraphViT(nn.Module):
    """An `OriginalViT` without control flow that depends on image sizes, so that sizes may be symbolic."""

    def __init__(self, vit: OriginalViT) -> None:
        super().__init__()
        self.vit = vit
        self.prefix = int(not vit.no_embed_class)
        assert vit.pos_embed is not None
        self.side = math.isqrt(vit.pos_embed.shape[1] - self.prefix)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, C, H, W)."""
        vit = cast(Any, self.vit)
        patches_BDhw = vit.patch_embed.proj(images)
        B, _, h, w = patches_BDhw.shape
        patches_BND = patches_BDhw.flatten(2).transpose(1, 2)
        first = [token.expand(B, -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
        table_1ND = self.position_embedding(h, w)
        if self.prefix:
            x_BTD = torch.cat([*first, patches_BND], dim=1) + table_1ND
        else:
            x_BTD = torch.cat([*first, patches_BND + table_1ND], dim=1)
        return vit.norm(vit.blocks(x_BTD))[:, 0]

    def position_embedding(self, h: int, w: int) -> Tensor:
        """`vit.resample_position_embedding` as two matrix products: (1, prefix + h w, D)."""
        table_1ND = cast(Tensor, self.vit.pos_embed)
        grid_ssD = table_1ND[0, self.prefix :].unflatten(0, (self.side, self.side))
        # No shift at the table's own size, where the matrices are exactly the identity.
        resized = (torch.scalar_tensor(h) != self.side) | (torch.scalar_tensor(w) != self.side)
        shift = 0.1 * resized.to(table_1ND.dtype)
        rows_hs, columns_ws = (_cubic_matrix(self.side, count, shift) for count in (h, w))
        grid_hwD = torch.einsum("hi,wj,ijd->hwd", rows_hs, columns_ws, grid_ssD)
        return torch.cat([table_1ND[:, : self.prefix], grid_hwD.flatten(0, 1)[None]], dim=1)


def _cubic_matrix(side: int, count: int, shift: Tensor) -> Tensor:
    """The matrix (count, side) of bicubic interpolation from `side` to `count` values at scale (count + shift) / side.

    Beyond the edge, the value at the edge is repeated.
    """
    positions_C = (torch.arange(count, dtype=shift.dtype) + 0.5) * side / (count + shift) - 0.5
    offsets_4 = torch.arange(-1, 3, dtype=shift.dtype)
    indices_C4 = positions_C.floor()[:, None] + offsets_4
    x_C4, a = (positions_C[:, None] - indices_C4).abs(), -0.75  # Keys' kernel, with PyTorch's constant
    near_C4 = ((a + 2) * x_C4 - (a + 3)) * x_C4**2 + 1
    far_C4 = ((x_C4 - 5) * x_C4 + 8) * x_C4 * a - 4 * a
    weights_C4 = torch.where(x_C4 <= 1, near_C4, far_C4)
    hit_C4s = indices_C4.clamp(0, side - 1)[:, :, None] == torch.arange(side, dtype=shift.dtype)
    return (weights_C4[:, :, None] * hit_C4s).sum(dim=1)
