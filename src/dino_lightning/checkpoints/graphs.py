"""Weights out as a graph: an ONNX file, or a program of `torch.export`; compared with the network before it counts.

The number of images is free. So are height and width where the network can: for a ViT any multiples of its patch size,
with the position embedding resampled inside the graph as the original does it.
"""

import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim

from dino_lightning.errors import UserError
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.models.vit import OriginalViT

TOLERANCE = 1e-4
"""Largest difference from the network's own features, relative to the largest of them where that is above 1.

In float32 other orders of summation differ by some 1e-6; a resampling or a kernel of another kind by 1e-2 and more."""
MAX_SIDE = 8192
"""Largest side of an image for which a graph with free sizes is made (pixels)."""
MIN_SIDE = 64
"""Smallest one for networks without patches (pixels): below it, their last maps have one pixel and other code runs."""
EXPORTER_LOGGERS = ("torch.onnx", "torch.export", "torch.__trace", "onnxscript", "onnx_ir")
"""Loggers of the exporters, which speak of their own passes."""
METADATA_FILE = "dino_lightning.json"
"""Name of the notes in a file of `torch.export`."""

Forward = Callable[[Tensor], Tensor]
"""Images -> features, computed by the file."""


def write_onnx(network: FrozenNetwork, path: Path, *, image_size: int | None) -> str:
    """Write an ONNX file and return in words which images it takes. Raises `UserError` where it cannot be.

    Input `images` (B, C, H, W), normalized; output `features` (B, D). The metadata say how images are prepared.
    """

    def write(module: nn.Module, example: Tensor, shapes: dict[int, Any]) -> Forward:
        import onnxruntime

        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            dynamic_shapes=(shapes,),
            input_names=["images"],
            output_names=["features"],
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props.update({name: json.dumps(value) for name, value in metadata(network).items()})
        program.save(path, external_data=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return _export(network, write, format="onnx", image_size=image_size)


def write_program(network: FrozenNetwork, path: Path, *, image_size: int | None) -> str:
    """Write a program for `torch.export.load` and return in words which images it takes; as `write_onnx`."""

    def write(module: nn.Module, example: Tensor, shapes: dict[int, Any]) -> Forward:
        program = torch.export.export(module, (example,), dynamic_shapes=(shapes,))
        torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(metadata(network))})
        return cast(Forward, torch.export.load(io.BytesIO(path.read_bytes())).module())

    return _export(network, write, format="torch", image_size=image_size)


def metadata(network: FrozenNetwork) -> dict[str, Any]:
    """What a file says of its images, in plain types."""
    return {
        "mean": network.mean,
        "std": network.std,
        "resize": network.resize,
        "size": network.size,
        "digest": network.digest,
    }


Exporter = Callable[[nn.Module, Tensor, dict[int, Any]], Forward]
"""(network, example of images, their free dimensions) -> the file's own way to compute."""


def _export(network: FrozenNetwork, write: Exporter, *, format: str, image_size: int | None) -> str:
    """Write with free height and width, or fixed ones where the network cannot; compare."""
    module = _GraphViT(network.backbone).eval() if isinstance(network.backbone, OriginalViT) else network.backbone
    if image_size is None:
        patch = getattr(getattr(network.backbone, "patch_embed", None), "patch_size", 1)
        step = patch if isinstance(patch, int) else patch[0]
        for least in (1,) if step > 1 else sorted({min(network.size, MIN_SIDE), MIN_SIDE}):
            if _export_any_size(network, module, write, step=step, least=least):
                sides = f"in multiples of {step} pixels" if step > 1 else f"of {least} pixels or more"
                return f"images of any number and size, sides {sides}"
        image_size = network.size
    example = _random_images(network, 2, image_size, image_size)
    try:
        with _silenced_exporters():
            check = write(module, example, {0: Dim("batch", min=1)})
    except OSError:
        raise
    except Exception as error:  # each exporter has errors of its own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"format={format}: {network.name} cannot be written ({reason}).") from error
    apart = _max_difference(network, check, sizes=[(image_size, image_size)])
    if not apart <= TOLERANCE:
        raise UserError(
            f"format={format}: what was written does not compute what {network.name} does (features differ "
            f"by {apart:.1e}), and is not kept."
        )
    return f"any number of images of {image_size} x {image_size} pixels only"


def _export_any_size(network: FrozenNetwork, module: nn.Module, write: Exporter, *, step: int, least: int) -> bool:
    """Write with free height and width, `least` steps of pixels or more; False where the network cannot: with a table
    of positions for one size, or where a smaller map is another case to it."""
    sides: list[Any] = [Dim(name, min=least, max=MAX_SIDE // step) for name in ("height", "width")]
    height, width = [step * side for side in sides] if step > 1 else sides
    # Neither square nor the size of the position embedding, lest the graph be one for such images only.
    near = max(-(-network.size // step), least)
    example = _random_images(network, 2, step * (near + 2), step * (near + 1))
    try:
        with _silenced_exporters():
            with torch.no_grad():
                module(example)  # a network of one size refuses it at once, its graph only after minutes
            check = write(module, example, {0: Dim("batch", min=1), 2: height, 3: width})
        sizes = [(step * near, step * near), (step * (near + 3), step * near), (step * near, step * (near + 4))]
        return _max_difference(network, check, sizes=sizes) <= TOLERANCE
    except OSError:
        raise
    except Exception:  # sizes that decide what is computed, operators that need fixed ones
        return False


@torch.no_grad()
def _max_difference(network: FrozenNetwork, check: Forward, *, sizes: list[tuple[int, int]]) -> float:
    """The largest relative difference from the network's features, for one and for three images of each size."""
    found = []
    for size in sizes:
        for count in (1, 3):
            images = _random_images(network, count, *size)
            ours, theirs = network.backbone(images), check(images)
            found.append(((ours - theirs).abs().max() / ours.abs().max().clamp(min=1)).item())
    return max(found)


def _random_images(network: FrozenNetwork, count: int, height: int, width: int) -> Tensor:
    """Noise of a fixed seed as images (count, C, height, width)."""
    return torch.randn(count, network.channels, height, width, generator=torch.Generator().manual_seed(0))


@contextmanager
def _silenced_exporters() -> Iterator[None]:
    """Leave the screen, and whoever collects logs, to what matters."""
    loggers = [logging.getLogger(name) for name in EXPORTER_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


class _GraphViT(nn.Module):
    """An `OriginalViT` whose sizes may be symbols: nothing in it asks which of two cases a size is."""

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
        table_1ND = self.table(h, w)
        if self.prefix:
            x_BTD = torch.cat([*first, patches_BND], dim=1) + table_1ND
        else:
            x_BTD = torch.cat([*first, patches_BND + table_1ND], dim=1)
        return vit.norm(vit.blocks(x_BTD))[:, 0]

    def table(self, h: int, w: int) -> Tensor:
        """`vit.resample_position_embedding` as two products with matrices: (1, prefix + h w, D)."""
        table_1ND = cast(Tensor, self.vit.pos_embed)
        grid_ssD = table_1ND[0, self.prefix :].unflatten(0, (self.side, self.side))
        # At the table's own size nothing is shifted: the matrices are then exactly the identity.
        resized = (torch.scalar_tensor(h) != self.side) | (torch.scalar_tensor(w) != self.side)
        shift = 0.1 * resized.to(table_1ND.dtype)
        rows_hs, columns_ws = (_cubic_matrix(self.side, count, shift) for count in (h, w))
        grid_hwD = torch.einsum("hi,wj,ijd->hwd", rows_hs, columns_ws, grid_ssD)
        return torch.cat([table_1ND[:, : self.prefix], grid_hwD.flatten(0, 1)[None]], dim=1)


def _cubic_matrix(side: int, count: int, shift: Tensor) -> Tensor:
    """The weights (count, side) by which bicubic interpolation makes `count` values of `side`, sampled at a scale of
    (count + shift) / side; beyond the edge stands the value at the edge."""
    at_C = (torch.arange(count, dtype=shift.dtype) + 0.5) * side / (count + shift) - 0.5
    offsets_4 = torch.arange(-1, 3, dtype=shift.dtype)
    places_C4 = at_C.floor()[:, None] + offsets_4
    x_C4, a = (at_C[:, None] - places_C4).abs(), -0.75  # Keys' kernel, with PyTorch's constant
    near_C4 = ((a + 2) * x_C4 - (a + 3)) * x_C4**2 + 1
    far_C4 = ((x_C4 - 5) * x_C4 + 8) * x_C4 * a - 4 * a
    weights_C4 = torch.where(x_C4 <= 1, near_C4, far_C4)
    hit_C4s = places_C4.clamp(0, side - 1)[:, :, None] == torch.arange(side, dtype=shift.dtype)
    return (weights_C4[:, :, None] * hit_C4s).sum(dim=1)
