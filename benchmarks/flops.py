"""Floating-point operations of a training step, counted from the configuration, and the matrix rate of the machine.

    python benchmarks/flops.py                                  ViT-S/16, 2 crops of 224 and 8 of 96, K = 65536
    python benchmarks/flops.py --backbone vit_base --patch 8

`dino_lightning/methods/flops.py` describes what is counted. This counts by part, for DINO only, without building
networks.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from dino_lightning.config import BackboneConfig, CropsConfig, DINOConfig, ViTConfig
from dino_lightning.config.registry import backbone_config, backbone_names
from dino_lightning.methods.base import GLOBAL_CROPS
from dino_lightning.methods.flops import Counts, backbone_flops, meta_network


def main() -> None:
    """Print the count by part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", choices=backbone_names(), default="vit_small")
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--locals", type=int, default=8)
    options = parser.parse_args()
    backbone = backbone_config(options.backbone)
    if isinstance(backbone, ViTConfig):
        backbone = dataclasses.replace(backbone, patch_size=options.patch)
    crops, method = CropsConfig(local_count=options.locals), DINOConfig(out_dim=options.prototypes)
    for name, count in step_flops(backbone, crops=crops, method=method).items():
        print(f"{name:<18} {count / 1e9:9.2f} GFLOP an image")
    print(f"{'all':<18} {model_flops(backbone, crops=crops, method=method) / 1e9:9.2f} GFLOP an image")


def model_flops(backbone: BackboneConfig, *, crops: CropsConfig, method: DINOConfig) -> float:
    """Operations of one training step per image."""
    return sum(step_flops(backbone, crops=crops, method=method).values())


def step_flops(backbone: BackboneConfig, *, crops: CropsConfig, method: DINOConfig) -> Counts:
    """Operations per image by part: the parts of `backbone_flops`, `head_mlp` and `prototypes`."""
    # Three passes over each crop for the student (forward 1, backward 2), one over the global crops for the teacher.
    passes = {crops.global_size: 4 * GLOBAL_CROPS, crops.local_size: 3 * crops.local_count}
    counts: Counts = {}
    for size, times in passes.items():
        for name, count in backbone_flops(backbone, image_size=size).items():
            counts[name] = counts.get(name, 0) + times * count
    for name, count in head_flops(method, features=feature_width(backbone)).items():
        counts[name] = sum(passes.values()) * count
    return counts


def head_flops(method: DINOConfig, *, features: int) -> Counts:
    """Operations of the head's forward pass over one crop."""
    widths = [features, *[method.head_hidden_dim] * (method.head_layers - 1), method.head_bottleneck_dim]
    linear = sum(fan_in * fan_out for fan_in, fan_out in pairwise(widths))
    return {"head_mlp": 2.0 * linear, "prototypes": 2.0 * method.head_bottleneck_dim * method.out_dim}


def feature_width(backbone: BackboneConfig) -> int:
    """Width of the head's input."""
    return backbone.width if isinstance(backbone, ViTConfig) else meta_network(backbone).num_features  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------- the machine


def matrix_rate(device: str, *, precision: str, size: int | None = None, turns: int = 5) -> float:
    """Operations per second of a large square matrix product, the best of several turns.

    `precision` is `32`, `tf32` or `bf16`. PyTorch's setting for float32 products is restored afterwards.
    """
    size = size or (8192 if device == "cuda" else 1024)
    products = 10 if device == "cuda" else 1
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    variants: list[Callable[[], Any]] = [lambda: torch.mm(a, b)]
    if device == "cpu":  # a 1×1 convolution over `size` pixels uses another library, which may be faster
        pixels, kernel = a.view(1, 2, size // 2, size).permute(0, 3, 1, 2), b[:, :, None, None]
        variants.append(lambda: torch.nn.functional.conv2d(pixels, kernel))
    try:
        best = min(seconds(run, times=products, device=device) for _ in range(turns + 1) for run in variants)
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * size**3 / best


def seconds(run: Callable[[], Any], *, times: int, device: str) -> float:
    """Seconds per call, on a GPU including its work."""
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(times):
        run()
    wait()
    return (time.perf_counter() - start) / times


if __name__ == "__main__":
    main()
