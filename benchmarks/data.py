"""Measures the speed of multi-crop augmentation: the original's transforms and our three back ends on the same JPEGs.

    python benchmarks/data.py                          # JPEGs made from the built-in images
    python benchmarks/data.py --images DIR --json      # JPEGs made from your photographs

`per core` is one process with one thread that reads, decodes and crops batches and copies them to a buffer (page-locked
memory if there is a GPU). The variants alternate, and a ratio is the median over the rounds. `device` ends with uint8
crops; `device, augmented on the CPU` adds the augmentation that normally runs on the GPU. With a GPU, the augmentation
of a batch is compared with a training step.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from original_crops import OriginalCrops
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from dino_lightning.config import CropsConfig, FolderData
from dino_lightning.data.batches import MultiCropDataset, start_worker
from dino_lightning.data.crops import RawCrops
from dino_lightning.data.crops.backends import raw_crop, sample_crops
from dino_lightning.data.crops.device_plan import make_device_plan
from dino_lightning.data.crops.numba import Finisher
from dino_lightning.data.crops.sampling import FastRNG
from dino_lightning.data.module import MultiCropDataModule
from dino_lightning.data.sources.builtin import BuiltinImages
from dino_lightning.runtime.memory import keep_freed_memory

SIZE = (500, 375)
QUALITY = 90
BACKENDS = ("pil", "cpu", "device")


def main() -> None:
    """Measure and print tables, and a JSON object with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--images", type=Path, help="folder of images from which the JPEGs are made; default: built-in images"
    )
    parser.add_argument("--count", type=int, default=128, help="number of JPEG files")
    parser.add_argument("--batch", type=int, default=32, help="images per batch")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each variant")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="numbers of loader processes to try")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        files = make_jpegs(Path(folder), options.images, count=options.count)
        results = per_core(files, batch=options.batch, rounds=options.rounds)
        print_rates(results)
        print_breakdown(files)
        results["workers"] = with_workers(files, workers=options.workers, batch=options.batch)
        print_workers(results["workers"])
    if torch.cuda.is_available():
        from data_gpu import measure_gpu

        results["gpu"] = measure_gpu(files)
    if options.json:
        print(json.dumps(results))


def make_jpegs(folder: Path, images: Path | None, *, count: int) -> list[Path]:
    """Write `count` JPEG files of 500 × 375 pixels."""
    for i, picture in enumerate(pictures(images, count=count)):
        width, height = picture.size
        scale = min(width / SIZE[0], height / SIZE[1])
        box = picture.crop((0, 0, round(scale * SIZE[0]), round(scale * SIZE[1])))
        box.resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"{i:05}.jpg", quality=QUALITY)
    return sorted(folder.glob("*.jpg"))


def pictures(images: Path | None, *, count: int) -> Iterator[Image.Image]:
    """Images from a folder, repeated if there are not enough, or built-in images."""
    if images is None:
        drawn = BuiltinImages("train", images=count, image_size=500, draw_seed=0)
        yield from (Image.fromarray(drawn.read(i)) for i in range(count))
        return
    files = [path for path in sorted(images.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    for i in range(count):
        yield Image.open(files[i * len(files) // count if len(files) > count else i % len(files)]).convert("RGB")


def dataset(files: list[Path], backend: str) -> MultiCropDataset:
    """The package's dataset of the files."""
    config = FolderData(path=str(files[0].parent), num_workers=0)
    data = MultiCropDataModule(config, CropsConfig(backend=backend), seed=0)
    return data.train_dataloader().loader.dataset  # type: ignore[return-value]


def batches(files: list[Path], *, batch: int) -> dict[str, Callable[[int], Any]]:
    """Name of a variant -> function that makes batch n of the files."""
    original = OriginalCrops(files)

    def keys(n: int) -> list[int]:
        return [(n * batch + i) % len(files) for i in range(batch)]

    def ours(backend: str) -> Callable[[int], Any]:
        data = dataset(files, backend)
        return lambda n: data.__getitems__([(n, key) for key in keys(n)])

    return {"original": lambda n: default_collate([original[key] for key in keys(n)]), **{b: ours(b) for b in BACKENDS}}


def tensors(batch: Any) -> list[Tensor]:
    """All tensors in a batch."""
    if isinstance(batch, RawCrops):
        return [
            t for group in batch.groups for t in (group.crops, group.plan.indices.tensor, group.plan.numbers.tensor)
        ]
    return batch


class TransferBuffer:
    """Memory to which batches are copied; page-locked if there is a GPU."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def receive(self, batch: Any) -> None:
        """Copy a batch."""
        for i, tensor in enumerate(tensors(batch)):
            if i == len(self.buffers):
                self.buffers.append(
                    torch.empty(2 * tensor.numel(), dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
                )
            self.buffers[i][: tensor.numel()].view_as(tensor).copy_(tensor)


def per_core(files: list[Path], *, batch: int, rounds: int) -> dict[str, Any]:
    """Times per image of all variants, which alternate, and ratios to the original."""
    makers, seconds, size = batches(files, batch=batch), {}, {}
    buffers = {name: TransferBuffer() for name in makers}
    config = CropsConfig(backend="device")
    for n in range(rounds + 1):
        for name, make in makers.items():
            start = time.perf_counter()
            crops = make(n)
            buffers[name].receive(crops)
            done = time.perf_counter()
            size[name] = sum(tensor.nbytes for tensor in tensors(crops)) / batch
            if name == "device":
                crops.augment(config)
                seconds.setdefault("device, augmented on the CPU", []).append((time.perf_counter() - start) / batch)
            seconds.setdefault(name, []).append((done - start) / batch)
    seconds = {name: values[1:] for name, values in seconds.items()}  # the first round is a warm-up
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds["original"], values, strict=True))
        for name, values in seconds.items()
    }
    return {
        "ratio_per_core": round(ratios["device"], 2),
        "ratio_cpu_all": round(ratios["cpu"], 2),
        "ratios": {name: round(ratio, 2) for name, ratio in ratios.items()},
        "milliseconds_per_image": {name: round(1000 * min(values), 3) for name, values in seconds.items()},
        "kilobytes_per_image": {name: round(value / 1000) for name, value in size.items()},
        "rounds": rounds,
        "batch": batch,
    }


def print_rates(results: dict[str, Any]) -> None:
    """Print one row for each variant."""
    table = Table("Crops", "ms / image (best)", "images / s / core", "× original (median)", "kB copied / image")
    for name, value in results["milliseconds_per_image"].items():
        size = results["kilobytes_per_image"].get(name, "")
        table.add_row(name, f"{value:.2f}", f"{1000 / value:.0f}", f"{results['ratios'][name]:.2f}", str(size))
    Console().print(table)


def print_breakdown(files: list[Path]) -> None:
    """Print the time of each step for one image."""
    data = dataset(files, "device")
    decoder, config = data.images.decode, CropsConfig(backend="device")
    contents = [path.read_bytes() for path in files[:16]]
    images = [decoder(content) for content in contents]
    parameters = [sample_crops(config, width=SIZE[0], height=SIZE[1], rng=FastRNG(i)) for i in range(len(images))]
    flat = [crop for crops in parameters for crop in crops]
    small = [raw_crop(image, crop) for image, crops in zip(images, parameters, strict=True) for crop in crops]
    finish, outs = Finisher(config), [torch.empty(crop.shape) for crop in small]
    steps: dict[str, Callable[[], Any]] = {
        "read the file": lambda: [path.read_bytes() for path in files[:16]],
        "decode": lambda: [decoder(content) for content in contents],
        "sample the parameters": lambda: [
            sample_crops(config, width=SIZE[0], height=SIZE[1], rng=FastRNG(i)) for i in range(len(images))
        ],
        "plan (device only)": lambda: make_device_plan(flat),
        "cut and resize ten crops": lambda: [
            raw_crop(image, crop) for image, crops in zip(images, parameters, strict=True) for crop in crops
        ],
        "flip, colors, blur, normalize": lambda: [
            finish(image, crop, out=out) for image, crop, out in zip(small, flat, outs, strict=True)
        ],
    }
    table = Table("Step (one core)", "ms / image (best)")
    for name, step in steps.items():
        table.add_row(name, f"{1000 * best(step) / len(images):.3f}")
    Console().print(table)


def best(step: Callable[[], Any], *, turns: int = 15) -> float:
    """Seconds of the fastest turn."""
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def with_workers(files: list[Path], *, workers: list[int], batch: int, turns: int = 12) -> list[dict[str, Any]]:
    """Images per second with PyTorch's data loader, and private memory of a loader process."""
    rows = []
    for count in workers:
        for name in ("original", *BACKENDS):
            data = OriginalCrops(files) if name == "original" else dataset(files, name)
            keys = [[(n * batch + i) % len(files) for i in range(batch)] for n in range(turns + 2 * count)]
            order: Any = (
                keys if name == "original" else [[(n, key) for key in batch_keys] for n, batch_keys in enumerate(keys)]
            )
            loader = DataLoader(
                data,
                batch_sampler=order,
                num_workers=count,
                collate_fn=None if name == "original" else lambda crops: crops,
                worker_init_fn=start_worker,
            )
            buffer, iterator = TransferBuffer(), iter(loader)
            for _ in range(2 * count):  # until every process has started
                buffer.receive(next(iterator))
            start = time.perf_counter()
            for crops in iterator:
                buffer.receive(crops)
                memory = private_megabytes(iterator._workers[0].pid)  # type: ignore[attr-defined]
            rate = turns * batch / (time.perf_counter() - start)
            rows.append({"workers": count, "crops": name, "images_per_second": round(rate), "megabytes": round(memory)})
    return rows


def private_megabytes(pid: int) -> float:
    """Private memory of a process in MB; 0 if the system does not report it."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1000


def print_workers(rows: list[dict[str, Any]]) -> None:
    """Print one row for each variant and one column for each number of processes."""
    counts = sorted({row["workers"] for row in rows})
    table = Table("Crops", *(f"images / s, {count} workers" for count in counts), "MB private / worker")
    for name in dict.fromkeys(row["crops"] for row in rows):
        by_count = {row["workers"]: row for row in rows if row["crops"] == name}
        memory = max(row["megabytes"] for row in by_count.values())
        table.add_row(name, *(str(by_count[count]["images_per_second"]) for count in counts), str(memory))
    Console().print(table)


if __name__ == "__main__":
    main()
