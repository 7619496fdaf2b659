"""The speedup by the cache of decoded images: images/s per core, decoded each time or read from the cache.

    python benchmarks/cache.py --data DIR         500x375 JPEGs made from Imagenette's photographs, a minute
    python benchmarks/cache.py --images DIR       your folder of images
    python benchmarks/cache.py --data DIR --json  the last line is one JSON object

One thread decodes (or reads) images and makes ten crops, two of 224 and eight of 96 pixels. Both variants process the
same images in the same shuffled order and alternate; the result is the median over the rounds. Files and cache are in
the page cache. Cached images are smaller (`--resize`), which makes the crops faster, too. The enlarged photographs are
smoother than real ones of that size, and their JPEGs are smaller; use `--images` to measure your own images.
"""

import argparse
import io
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from dino_lightning.config import CropsConfig, DataConfig, FolderData
from dino_lightning.data.cache import cached
from dino_lightning.data.crops import crop_backend
from dino_lightning.data.decode import Decoder
from dino_lightning.data.sources import ImageSource, open_sources

WIDTH, HEIGHT, QUALITY = 500, 375, 90


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of images; default: made from --data")
    parser.add_argument("--data", type=Path, help="folder with Imagenette's val.parquet")
    parser.add_argument("--count", type=int, default=400, help="number of images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--resize", type=int, default=256, help="shorter side of a cached image (pixels)")
    parser.add_argument("--cache", choices=["ram", "disk"], default="ram")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    if not (options.images or options.data):
        parser.error("set --images or --data")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        images = options.images or make_photographs(options.data, Path(folder) / "photographs", count=options.count)
        cache_dir = str(Path(folder) / "cache")
        config = FolderData(path=str(images), cache_resize=options.resize, cache=options.cache, cache_dir=cache_dir)
        result = measure(config, count=options.count, rounds=options.rounds)
    show(result)
    if options.json:
        print(json.dumps({**result, "torch": torch.__version__, "resize": options.resize, "cache": options.cache}))


def make_photographs(data: Path, folder: Path, *, count: int) -> Path:
    """Imagenette's squares of 160 pixels, enlarged to a common size of ImageNet's photographs and stored as JPEG."""
    folder.mkdir(parents=True)
    column = pq.read_table(data / "val.parquet", columns=["image"]).column("image")
    # The rows are sorted by class.
    for row in range(0, len(column), max(1, len(column) // count)):
        image = Image.open(io.BytesIO(column[row].as_py()["bytes"])).convert("RGB")
        image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(folder / f"{row:05}.jpg", quality=QUALITY)
    return folder


def measure(config: DataConfig, *, count: int, rounds: int) -> dict[str, float]:
    """Images per second of one thread with and without cache, with and without crops; size of the cache."""
    decoder = Decoder(config)
    stored = open_sources(config, seed=0).train
    assert isinstance(stored, ImageSource)
    started = time.perf_counter()
    from_cache = cached(stored, config=config, decoder=decoder, bad_images=None, workers=2)
    build = time.perf_counter() - started
    crops = crop_backend(CropsConfig(backend="device"), channels=3)
    order = random.Random(0).sample(range(len(stored)), min(count, len(stored)))
    variants = {
        "decode": lambda: [decoder.pixels(stored.read(index)) for index in order],
        "cached": lambda: [decoder.pixels(from_cache.read(index)) for index in order],
        "decode_crops": lambda: [crops([decoder.pixels(stored.read(index))], [index]) for index in order],
        "cached_crops": lambda: [crops([decoder.pixels(from_cache.read(index))], [index]) for index in order],
    }
    rates = {name: len(order) / seconds for name, seconds in timed(variants, rounds=rounds).items()}
    return {
        **{f"{name}_images_per_s": round(rate, 1) for name, rate in rates.items()},
        "ratio_decode": round(rates["cached_crops"] / rates["decode_crops"], 2),
        "ratio_decode_alone": round(rates["cached"] / rates["decode"], 2),
        "bytes_per_image": round(sum(decoder.pixels(from_cache.read(index)).numel() for index in order) / len(order)),
        "stored_bytes_per_image": round(sum(len(stored.read(index)) for index in order) / len(order)),
        "build_s": round(build, 2),
        "images": len(order),
    }


def timed(variants: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Median seconds of each variant; they alternate, so that a slow moment of the machine affects all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            torch.manual_seed(number)
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first round is a warm-up


def show(result: dict[str, float]) -> None:
    """Print the table."""
    table = Table(title=f"{result['images']} images, one thread, images/s")
    table.add_column("")
    for column in ("decoded each time", "from the cache", "ratio"):
        table.add_column(column, justify="right")
    for label, suffix, ratio in (
        ("pixels", "", "ratio_decode_alone"),
        ("pixels and ten crops", "_crops", "ratio_decode"),
    ):
        rates = [f"{result[f'{variant}{suffix}_images_per_s']:.0f}" for variant in ("decode", "cached")]
        table.add_row(label, *rates, f"{result[ratio]:.2f}")
    sizes = [f"{result[name] / 1e3:.0f}" for name in ("stored_bytes_per_image", "bytes_per_image")]
    table.add_row("kB per image", *sizes, "")
    Console().print(table)


if __name__ == "__main__":
    main()
