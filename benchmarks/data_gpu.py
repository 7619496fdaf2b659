"""Measures augmentation, a training step and decoding (nvJPEG) on a GPU. `data.py` calls it if there is a GPU."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import interpolate
from torchvision.io import decode_jpeg

from dino_lightning.config import CropsConfig, DINOConfig, ViTConfig
from dino_lightning.config.model import AdamWConfig
from dino_lightning.data.crops.backends import DeviceBatches
from dino_lightning.data.crops.device_plan import make_device_plan
from dino_lightning.data.crops.photometric import augment
from dino_lightning.data.crops.sampling import Crop, FastRNG, sample_crops
from dino_lightning.methods.dino import DINO
from dino_lightning.methods.parts import MethodParts
from dino_lightning.models.backbones import build_backbone

BATCH = 64


def measure_gpu(files: list[Path]) -> dict[str, float]:
    """Milliseconds per batch of 64 images."""
    config, device = CropsConfig(backend="device"), torch.device("cuda")
    contents = [path.read_bytes() for path in (files * BATCH)[:BATCH]]
    encoded = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
    images = [decode_jpeg(content) for content in encoded]
    cut = DeviceBatches(config)(images, list(range(BATCH)))
    on_gpu = cut.to(device)
    results = {
        "copy": timed(lambda: cut.pin_memory().to(device)),
        "augmentation": timed(lambda: on_gpu.augment(config)),
        "training step": timed(training_step(on_gpu.augment(config), device)),
        "decode and cut on the GPU (nvJPEG)": timed(lambda: decode_and_cut(encoded, config, device)),
    }
    results["augmentation, share of a training step"] = results["augmentation"] / results["training step"]
    table = Table(torch.cuda.get_device_name(), "ms / 64 images")
    for name, value in results.items():
        table.add_row(name, f"{value:.3f}")
    Console().print(table)
    return {name: round(value, 4) for name, value in results.items()}


def training_step(views: list[torch.Tensor], device: torch.device) -> Callable[[], Any]:
    """A function that runs forward, backward and update of ViT-S/16 with the original's head, in bfloat16."""
    networks = [build_backbone(ViTConfig(), image_size=224, drop_path=flag).to(device) for flag in (True, False)]
    module = DINO(
        DINOConfig(),
        MethodParts(
            networks[0],
            teacher_backbone=networks[1],
            feature_dim=384,
            optim=AdamWConfig(),
            batch_size_per_device=BATCH,
        ),
    ).to(device)
    optimizer = torch.optim.AdamW(module.student.parameters(), lr=1e-5)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            with torch.no_grad():
                targets = module.teacher(views[:2])
            loss = -(targets.softmax(-1).repeat(5, 1) * module.student(views).log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def decode_and_cut(encoded: list[torch.Tensor], config: CropsConfig, device: torch.device) -> list[torch.Tensor]:
    """Decode with nvJPEG, cut ten crops per image and augment them, all on the GPU."""
    images = decode_jpeg(encoded, device=device)
    parameters = [
        sample_crops(config, width=image.shape[2], height=image.shape[1], rng=FastRNG(i))
        for i, image in enumerate(images)
    ]
    finished = []
    for views in (slice(0, 2), slice(2, None)):
        crops = [(image, crop) for image, boxes in zip(images, parameters, strict=True) for crop in boxes[views]]
        plan = make_device_plan([crop for _, crop in crops])
        cut = torch.stack([cut_float(*crops[i]) for i in plan.order])
        finished.append(augment(cut, plan.changed(lambda tensor: tensor.to(device)), config))
    return finished


def cut_float(image: torch.Tensor, crop: Crop) -> torch.Tensor:
    """Cut one crop. On a GPU, PyTorch's bicubic interpolation with antialiasing needs floats."""
    top, left, height, width = crop.box
    box = image[None, :, top : top + height, left : left + width].float()
    return interpolate(box, (crop.size, crop.size), mode="bicubic", antialias=True)[0].round_().clamp_(0, 255)


def timed(step: Callable[[], Any], *, turns: int = 20) -> float:
    """Milliseconds per call, after a warm-up."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(turns):
        step()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / turns
