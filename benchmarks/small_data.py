"""Searches for good settings for small datasets: short trainings that differ in one setting, and their k-NN.

    python benchmarks/small_data.py --output DIR                          the built-in images; half an hour on one core
    python benchmarks/small_data.py --output DIR --images 600 --epochs 60 --factors out_dim
    python benchmarks/small_data.py --output DIR --parquet CIFAR --images 2000 --epochs 16 --experiment photos32
    python benchmarks/small_data.py --output DIR --images 2000 --epochs 16 --suggested --set backbone=vit_micro

CIFAR is a folder with `train.parquet` and `val.parquet`; the same number of images of each class is extracted to a
folder below DIR. Each run is `python train.py` with one thread and its own folder below DIR; finished runs are not
repeated. With `--suggested`, the runs use `experiment=small_data`: one with all suggested values, the others with the
paper's value of one key. The table has k-NN top-1 of the teacher after the last epoch: the mean over `--seeds`, and
their range. docs/small_data.md has the results.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from dino_lightning.data.sources.base import content_digest

ROOT = Path(__file__).parents[1]
QUERIES = 1000

FACTORS: dict[str, list[list[str]]] = {
    "out_dim": [[f"method.out_dim={k}"] for k in (64, 256, 1024, 4096)],
    "teacher_momentum": [[f"method.teacher_momentum={m}"] for m in (0.9, 0.95, 0.98, 0.99, 0.996, 0.999)],
    "teacher_temperature": [
        [f"method.teacher_temperature={t}", f"method.teacher_temperature_start={t}"] for t in (0.02, 0.04, 0.06, 0.08)
    ],
    "lr": [[f"optim.lr={lr}"] for lr in (0.0005, 0.002, 0.008, 0.03)],
    "global_scale": [[f"crops.global_scale=[{low},1]"] for low in (0.14, 0.25, 0.4, 0.6)],
    "local_count": [[f"crops.local_count={n}"] for n in (0, 2, 4, 8)],
    "patch_size": [[f"backbone.patch_size={p}"] for p in (4, 8, 16)],
}
"""Factor -> the overrides for each of its values."""
SUGGESTED = [[], ["method.teacher_momentum=0.996"], ["optim.lr=0.0005"], ["method.out_dim=65536"]]
"""Overrides of the runs with `--suggested`: none, or the paper's value of one key."""
COMMON = [
    "cpu_threads=1",
    "data.num_workers=0",
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "trainer.enable_progress_bar=false",
    "trainer.enable_checkpointing=false",
    "callbacks.pictures.enabled=false",
    "callbacks.knn.every_n_epochs=100000",
]


def main() -> None:
    """Train the missing runs and print the table."""
    options = parse()
    chosen = {name: FACTORS[name] for name in options.factors}
    chosen = {"suggested": SUGGESTED} if options.suggested else chosen
    chosen = {"tried": [[override] for override in options.tried]} if options.tried else chosen
    rows = []
    for factor, settings in chosen.items():
        for setting in settings:
            top1 = [run(setting, options, seed=seed) for seed in options.seeds]
            rows.append({"factor": factor, "setting": " ".join(setting) or "all", "knn_top1": top1})
    print_table(rows, options)
    if options.json:
        print(json.dumps({"command": " ".join(["python", *sys.argv]), "rows": rows}))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the runs")
    add(
        "--parquet",
        type=Path,
        metavar="DIR",
        help="folder with train.parquet and val.parquet; default: the built-in images",
    )
    add("--images", type=int, default=6000, metavar="N", help="training images (%(default)s)")
    add("--epochs", type=int, default=6, metavar="N", help="length of each run (%(default)s)")
    add("--experiment", default="quick", help="experiment of the runs (%(default)s); not with --suggested")
    add("--factors", nargs="+", choices=list(FACTORS), default=["out_dim", "teacher_momentum", "teacher_temperature"])
    add(
        "--try",
        dest="tried",
        nargs="+",
        metavar="KEY=VALUE",
        help="runs with one of these overrides, instead of the factors",
    )
    add("--suggested", action="store_true", help="experiment=small_data, alone and with the paper's values")
    add("--seeds", nargs="+", type=int, default=[0], metavar="S", help="seeds of the runs (%(default)s)")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for all runs")
    add("--json", action="store_true", help="print one JSON object as the last line")
    return parser.parse_args()


def run(setting: list[str], options: argparse.Namespace, *, seed: int) -> float | None:
    """k-NN top-1 in percent after one training; None if the training failed."""
    experiment = "small_data" if options.suggested else options.experiment
    overrides = [f"experiment={experiment}", *images(options), f"trainer.max_epochs={options.epochs}", f"seed={seed}"]
    overrides += [*setting, *options.set]
    name = "_".join(override.replace("/", "-") for override in overrides if not override.startswith("data.path"))
    # File names are limited to 255 bytes.
    output = options.output / (name if len(name) < 200 else f"{name[:180]}_{content_digest(name.encode())}")
    if not (output / "summary.json").exists():
        command = [sys.executable, str(ROOT / "train.py"), *overrides, *COMMON, f"output_dir='{output.absolute()}'"]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode:
            print(f"{' '.join(overrides)}: {process.stderr[-2000:]}", file=sys.stderr)
            return None
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    print(
        f"{summary['knn_top1']:6.2f}  (untrained {summary['knn_top1_untrained']:.2f}, raw pixels "
        f"{summary['knn_top1_pixels']:.2f})  {' '.join(overrides)}",
        file=sys.stderr,
        flush=True,
    )
    return summary["knn_top1"]


def images(options: argparse.Namespace) -> list[str]:
    """The overrides that select the images; images from parquet files are extracted first."""
    if options.parquet is None:
        return ["data=builtin", f"data.train_images={options.images}"]
    folder = options.output / f"images_{options.parquet.name}_{options.images}"
    if not folder.exists():
        for split, count in (("train", options.images), ("val", QUERIES)):
            write_split(options.parquet / f"{split}.parquet", folder / split, count)
    return ["data=folder", f"data.path={folder.absolute()}"]


def write_split(parquet: Path, folder: Path, count: int) -> None:
    """Write the first images of each class as files, the same number for each class."""
    table = pq.read_table(parquet, columns=["image", "label"])
    labels = table["label"].to_pylist()
    per_class, written = count // len(set(labels)), dict.fromkeys(labels, 0)
    for row, label in enumerate(labels):
        if written[label] < per_class:
            path = folder / f"class{label}" / f"{written[label]:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(table["image"][row].as_py()["bytes"])
            written[label] += 1


def print_table(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print one row for each setting."""
    source = "built-in" if options.parquet is None else options.parquet.name
    table = Table(
        "Factor",
        "Setting",
        "k-NN top-1",
        "range",
        "n",
        title=f"{options.images} images of {source}, {options.epochs} epochs",
    )
    for row in rows:
        values = [value for value in row["knn_top1"] if value is not None]
        value_range = f"{max(values) - min(values):.1f}" if len(values) > 1 else ""
        mean = f"{statistics.mean(values):.1f}" if values else "failed"
        table.add_row(row["factor"], row["setting"], mean, value_range, str(len(values)))
    Console(width=None if sys.stdout.isatty() else 150).print(table)


if __name__ == "__main__":
    main()
