"""Compares features of the original's networks and ours with the same weights; prints the largest differences.

    python benchmarks/original_networks.py --original DIR [--xcit DIR]        all networks and sizes, an hour on 2 cores
    python benchmarks/original_networks.py --original DIR --networks vits16 resnet50 --sizes 224 96

The DIRs are checkouts of facebookresearch/dino and, for XCiT, of facebookresearch/xcit. Each original network gets
random weights and is saved in the layout of the published files. `load_network` loads this file, `export_network` with
`format="original"` exports it, and the original loads the result with `strict=True`.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_lightning.checkpoints import load_network
from dino_lightning.checkpoints.formats import export_network

VITS = {"vits16": ("vit_small", 16), "vits8": ("vit_small", 8), "vitb16": ("vit_base", 16), "vitb8": ("vit_base", 8)}
XCITS = ("xcit_small_12_p16", "xcit_small_12_p8")
NETWORKS = (*VITS, "resnet50", *XCITS)
SIZES = ("224", "96", "480x848")


def main() -> None:
    """Print a row for each network and size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--original", type=Path, required=True, help="checkout of facebookresearch/dino")
    parser.add_argument("--xcit", type=Path, help="checkout of facebookresearch/xcit")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="side, or HEIGHTxWIDTH, in pixels")
    options = parser.parse_args()
    print("network             image        |d features|  (largest feature)")
    for name in options.networks:
        checkout = options.xcit if name in XCITS else options.original
        if checkout is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            for size, difference, largest in compared(
                name, checkout, Path(folder), sizes=options.sizes, dtype=getattr(torch, options.dtype)
            ):
                print(f"{name:19} {size:>9} px {difference:12.1e}  ({largest:.1f})", flush=True)


@torch.no_grad()
def compared(
    name: str, checkout: Path, folder: Path, *, sizes: list[str], dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, float, float]]:
    """Yield (size, largest difference, largest feature) for an image of each size; `folder` is for weight files."""
    theirs = original_network(name, checkout)
    torch.save(theirs.state_dict(), folder / "theirs.pth")
    ours = load_network(str(folder / "theirs.pth"))
    export_network(ours, folder / "ours.pth", format="original", checkpoint="theirs.pth", image_size=None)
    theirs.load_state_dict(torch.load(folder / "ours.pth", weights_only=True), strict=True)
    theirs, backbone = theirs.to(dtype), ours.backbone.to(dtype)
    for size in sizes:
        height, _, width = size.partition("x")
        images = torch.randn(1, 3, int(height), int(width or height), generator=torch.Generator().manual_seed(0)).to(
            dtype
        )
        features: Tensor = theirs(images)
        yield size, (backbone(images) - features).abs().max().item(), features.abs().max().item()


def original_network(name: str, checkout: Path) -> nn.Module:
    """A network of the original in eval mode with random weights and statistics."""
    torch.manual_seed(0)
    if name == "resnet50":  # the original uses torchvision's
        from torchvision.models import resnet50

        network: nn.Module = resnet50()
        network.fc = nn.Identity()  # type: ignore[assignment]
    elif name in XCITS:
        with modules_of(checkout, "xcit") as (xcit,):
            network = getattr(xcit, name)(num_classes=0)
    else:
        kind, patch = VITS[name]
        with modules_of(checkout, "vision_transformer", "utils") as (vits, _):
            network = getattr(vits, kind)(patch_size=patch, num_classes=0)
    for tensor in network.state_dict().values():  # change norms, biases and statistics from their initial values
        if tensor.ndim == 1:
            tensor.add_(torch.rand_like(tensor) * 0.1)
    return network.eval().requires_grad_(False)


@contextmanager
def modules_of(checkout: Path, *names: str) -> Iterator[list[Any]]:
    """Import modules of a checkout temporarily, because their names are too common."""
    sys.path.insert(0, str(checkout))
    try:
        yield [import_module(name) for name in names]
    finally:
        sys.path.remove(str(checkout))
        for name in names:
            sys.modules.pop(name, None)


if __name__ == "__main__":
    main()
